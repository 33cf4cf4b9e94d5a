"""The specification. Every test compares with a plain loop, a second route or an exact property, on tiny models and
videos that it makes itself. `pytest` runs it all in minutes on two CPU cores; `MAE_LONG=1 pytest` runs the large
numbers: thousands of clips, hundreds of damaged files, dozens of kills.
"""

import contextlib
import json
import math
import os
import random as pyrandom
import signal
import subprocess
import sys
import time
import types
import zipfile
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import mae_st
import train
from mae_st import STRATEGIES, MaskedAutoencoder, mask_noise, patchify, split_tokens, unpatchify

LONG = os.environ.get("MAE_LONG") == "1"
HERE = Path(__file__).parent
SMALL = dict(frames=4, height=12, width=20, patch=(2, 4, 4), dim=24, depth=2, heads=3, decoder_dim=16, decoder_depth=2, decoder_heads=2)


def assert_close(a, b, tolerance, what=""):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    difference = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    assert difference <= tolerance, f"{what}: the largest difference is {difference:.3g}, allowed {tolerance:.3g}"


# ------------------------------------------------------------------------------------------- patches, masks


@pytest.mark.parametrize("size, patch, channels", [((4, 6, 10), (2, 3, 5), 3), ((3, 4, 4), (1, 2, 4), 1), ((6, 5, 7), (3, 5, 1), 2)])
def test_patchify_equals_a_plain_loop_and_unpatchify_is_its_inverse(size, patch, channels):
    (T, H, W), (u, p, q) = size, patch
    video = torch.randint(0, 256, (2, channels, *size), dtype=torch.uint8)
    patches = patchify(video, patch)
    expected = [[video[b, :, t:t + u, y:y + p, x:x + q].permute(1, 2, 3, 0).flatten()
                 for t in range(0, T, u) for y in range(0, H, p) for x in range(0, W, q)] for b in range(2)]
    assert torch.equal(patches, torch.stack([torch.stack(row) for row in expected]))
    assert torch.equal(unpatchify(patches, patch, (T // u, H // p, W // q)), video)


def test_a_size_that_the_patch_does_not_divide_is_an_error_that_names_both_numbers():
    with pytest.raises(ValueError, match="height 225.*16"):
        patchify(torch.zeros(1, 3, 16, 225, 224), (2, 16, 16))
    with pytest.raises(ValueError, match="7 patches"):
        unpatchify(torch.zeros(1, 7, 12), (1, 2, 2), (2, 2, 2))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("grid", [(8, 14, 14), (3, 5, 7)])
def test_masks_partition_the_tokens_with_the_same_number_for_every_clip(strategy, grid):
    t, h, w = grid
    noise = mask_noise(strategy, 5, grid, torch.Generator().manual_seed(1))
    assert torch.equal(noise, mask_noise(strategy, 5, grid, torch.Generator().manual_seed(1)))
    keep, hide = split_tokens(noise, grid, 0.75)
    for b in range(5):
        assert sorted(keep[b].tolist() + hide[b].tolist()) == list(range(t * h * w))
    seen = torch.zeros(5, t * h * w, dtype=torch.bool).scatter(1, keep, True).view(5, t, h, w)
    if strategy == "tube":
        assert keep.shape[1] == math.floor(h * w * 0.25) * t and (seen == seen[:, :1]).all()
    elif strategy == "frame":
        assert keep.shape[1] == max(1, math.floor(t * 0.25)) * h * w and (seen == seen[:, :, :1, :1]).all()
    else:
        assert keep.shape[1] == math.floor(t * h * w * 0.25)
    if strategy == "block":  # cubes are seen whole or hidden whole, all but the one where the number ran out
        sides = [math.ceil(length / 4) for length in grid]
        for b in range(5):
            cubes = [seen[b, i:i + sides[0], j:j + sides[1], k:k + sides[2]] for i in range(0, t, sides[0]) for j in range(0, h, sides[1]) for k in range(0, w, sides[2])]
            assert sum(bool(cube.any() and not cube.all()) for cube in cubes) <= 1


def test_the_smallest_noise_is_kept():
    noise = torch.rand(3, 2, 3, 5)
    keep, hide = split_tokens(noise, (2, 3, 5), 0.6)
    for b in range(3):
        assert noise[b].flatten()[keep[b]].max() < noise[b].flatten()[hide[b]].min()


def test_agnostic_masks_choose_every_token_equally_often():
    keep, _ = split_tokens(mask_noise("agnostic", 4000, (2, 4, 4), torch.Generator().manual_seed(0)), (2, 4, 4), 0.75)
    share = torch.bincount(keep.flatten(), minlength=32) / 4000
    assert_close(share, torch.full((32,), 0.25), 5 * math.sqrt(0.25 * 0.75 / 4000), "share of clips in which a token is seen")


@pytest.mark.parametrize("tokens, ratio, kept", [(1568, 0.9, 156), (100, 0.9, 10), (1568, 0.75, 392), (1568, 0.95, 78), (10, 0.99, 1)])
def test_visible_tokens_are_counted_in_whole_numbers(tokens, ratio, kept):
    keep, _ = split_tokens(torch.rand(1, 1, 1, tokens), (1, 1, tokens), ratio)
    assert keep.shape[1] == kept


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, math.nan])
def test_a_ratio_that_hides_nothing_or_everything_is_an_error(ratio):
    with pytest.raises(ValueError, match="mask ratio"):
        split_tokens(torch.rand(1, 2, 2, 2), (2, 2, 2), ratio)
    with pytest.raises(ValueError, match="hides nothing"):
        split_tokens(torch.rand(1, 1, 1, 1), (1, 2, 2), 0.5)  # one frame: the only one is kept


# ------------------------------------------------------------------------------------------------ the model


def plain_block(block, x):
    """One transformer block on one clip's tokens (N, D), written out."""
    D, heads = x.shape[1], block.attn.heads
    d = D // heads
    q, k, v = F.linear(F.layer_norm(x, (D,), block.norm1.weight, block.norm1.bias, 1e-6), block.attn.qkv.weight, block.attn.qkv.bias).split(D, dim=1)
    out = [torch.softmax(q[:, i:i + d] @ k[:, i:i + d].T / math.sqrt(d), dim=1) @ v[:, i:i + d] for i in range(0, D, d)]
    x = x + F.linear(torch.cat(out, dim=1), block.attn.proj.weight, block.attn.proj.bias)
    y = F.linear(F.layer_norm(x, (D,), block.norm2.weight, block.norm2.bias, 1e-6), block.mlp[0].weight, block.mlp[0].bias)
    return x + F.linear(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), block.mlp[2].weight, block.mlp[2].bias)


def plain_loss(model, video, hidden):
    """The paper's loss, token by token and clip by clip. hidden: bool (B, t, h, w)."""
    encoder, losses = model.encoder, []
    u, p, q = encoder.patch
    _, H, W = encoder.grid
    for b in range(len(video)):
        tokens, rows, targets, places = [encoder.cls_token[0] + encoder.pos_cls[0]], [0], [], []
        for i, (ti, yi, xi) in enumerate(np.ndindex(*encoder.grid)):
            patch = video[b, :, ti * u:(ti + 1) * u, yi * p:(yi + 1) * p, xi * q:(xi + 1) * q].permute(1, 2, 3, 0)  # (u, p, q, C)
            if hidden[b, ti, yi, xi]:
                target = patch[0].flatten() if model.target == "frame" else patch.flatten()
                if model.norm_pix:
                    target = (target - target.mean()) / torch.sqrt(((target - target.mean())**2).sum() / (len(target) - 1) + 1e-6)
                targets.append(target)
                places.append(i)
            else:
                tokens.append(encoder.embed.weight @ patch.flatten() + encoder.embed.bias + encoder.pos_time[ti] + encoder.pos_space[yi * W + xi])
                rows.append(1 + i)
        x = torch.stack(tokens)
        for block in encoder.blocks:
            x = plain_block(block, x)
        x = F.linear(F.layer_norm(x, x.shape[1:], encoder.norm.weight, encoder.norm.bias, 1e-6), model.decoder_embed.weight, model.decoder_embed.bias)
        full = [model.mask_token[0] + model.decoder_pos[i] for i in range(1 + H * W * encoder.grid[0])]  # in their natural order
        for row, token in zip(rows, x):
            full[row] = token + model.decoder_pos[row]
        y = torch.stack(full)
        for block in model.decoder_blocks:
            y = plain_block(block, y)
        y = F.layer_norm(y, y.shape[1:], model.decoder_norm.weight, model.decoder_norm.bias, 1e-6)
        for place, target in zip(places, targets):
            losses.append(((model.decoder_pred(y[1 + place]) - target)**2).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("target, norm_pix", [("frame", True), ("patch", False)])
def test_loss_and_all_gradients_equal_a_plain_loop(strategy, target, norm_pix):
    torch.manual_seed(0)
    model = MaskedAutoencoder(**SMALL | dict(frames=6, height=9, width=20, patch=(2, 3, 4)), target=target, norm_pix=norm_pix).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases and norms too, so that each one matters
    video, noise = torch.randn(2, 3, 6, 9, 20, dtype=torch.float64), mask_noise(strategy, 2, model.encoder.grid)
    keep, _ = split_tokens(noise, model.encoder.grid, 0.6)
    hidden = torch.ones(2, 45, dtype=torch.bool).scatter(1, keep, False).view(2, 3, 3, 5)
    loss, expected = model(video, 0.6, noise), plain_loss(model, video, hidden)
    assert_close(loss.detach(), expected.detach(), 1e-10, "loss")
    names, parameters = zip(*model.named_parameters())
    for name, a, b in zip(names, torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        assert b.abs().max() > 0, f"{name} has no part in the loss"
        assert_close(a, b, 1e-9 * max(1, b.abs().max().item()), f"gradient of {name}")


def test_hidden_pixels_never_reach_the_encoder():
    model, noise = MaskedAutoencoder(**SMALL), mask_noise("agnostic", 1, (2, 3, 5))
    video = torch.randint(0, 256, (1, 3, 4, 12, 20), dtype=torch.uint8)
    patches = patchify(video, (2, 4, 4))
    keep, hide = split_tokens(noise, (2, 3, 5), 0.9)
    other = patches.clone()
    other[0, hide[0]] = 255 - other[0, hide[0]]
    assert torch.equal(model.encoder(patches, keep), model.encoder(other, keep))
    other[0, keep[0]] = 255 - other[0, keep[0]]
    assert not torch.equal(model.encoder(patches, keep), model.encoder(other, keep))


def test_bytes_and_normalised_floats_give_the_same_loss():
    model, noise = MaskedAutoencoder(**SMALL), mask_noise("agnostic", 2, (2, 3, 5))
    video = torch.randint(0, 256, (2, 3, 4, 12, 20), dtype=torch.uint8)
    assert_close(model(video, 0.8, noise).detach(), model((video.float() / 255 - 0.45) / 0.225, 0.8, noise).detach(), 1e-6, "loss")
    with pytest.raises(ValueError, match="int64"):
        model(video.long())
    with pytest.raises(ValueError, match=r"takes \(B, 3, 4, 12, 20\)"):
        model(video[..., :16])


@pytest.mark.parametrize("target, norm_pix", [("frame", True), ("patch", False)])
def test_reconstruct_keeps_what_was_seen_and_fills_in_the_predictions(target, norm_pix):
    model = MaskedAutoencoder(**SMALL, target=target, norm_pix=norm_pix)
    video, noise = torch.randint(0, 256, (2, 3, 4, 12, 20), dtype=torch.uint8), mask_noise("agnostic", 2, (2, 3, 5))
    filled, mask = model.reconstruct(video, 0.7, noise)
    step = 2 if target == "frame" else 1
    original = video[:, :, ::step].float() / 255
    hidden = mask.repeat_interleave(2 // step, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)[:, None].expand_as(original)
    assert_close(filled[~hidden], original[~hidden], 1e-6, "seen pixels")
    assert mask.sum() == 2 * (30 - 9) and not torch.allclose(filled[hidden], original[hidden])
    difference = patchify((filled - original) / 0.225, model.target_patch)  # the loss, again, from the picture
    if norm_pix:
        difference = difference / (patchify(original / 0.225, model.target_patch).var(-1, keepdim=True) + 1e-6).sqrt()
    assert_close((difference**2).mean() / 0.7, model(video, 0.7, noise).detach(), 1e-4, "loss from the picture")


def test_features_are_the_encoder_over_all_tokens_with_the_class_token_apart():
    encoder = MaskedAutoencoder(**SMALL).encoder
    video = torch.randn(2, 3, 4, 12, 20)
    tokens, cls = encoder.features(video)
    assert tokens.shape == (2, 30, 24) and cls.shape == (2, 24)
    order = torch.randperm(30).expand(2, 30)
    shuffled = encoder.norm(encoder(encoder.patches(video), order))  # every token kept, in another order
    assert_close(shuffled[:, 1:].detach(), tokens[:, order[0]].detach(), 1e-5, "tokens")
    assert_close(shuffled[:, 0].detach(), cls.detach(), 1e-5, "class token")


def test_checkpointed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    plain, again = MaskedAutoencoder(**SMALL), MaskedAutoencoder(**SMALL, checkpointing=True)
    again.load_state_dict(plain.state_dict())
    video, noise = torch.randn(2, 3, 4, 12, 20), mask_noise("agnostic", 2, (2, 3, 5))
    for model in (plain, again):
        model(video, 0.8, noise).backward()
    for (name, a), b in zip(plain.named_parameters(), again.parameters()):
        assert_close(a.grad, b.grad, 1e-6, name)


def test_drop_path_skips_whole_clips_and_keeps_the_mean():
    drop, x = mae_st.DropPath(0.25), torch.ones(4000, 2, 3)
    y = drop(x)
    kept = y[:, 0, 0] > 0
    assert_close(y[kept], x[kept] / 0.75, 1e-6, "kept clips")
    assert (y[~kept] == 0).all() and abs(kept.float().mean() - 0.75) < 0.04
    assert torch.equal(drop.eval()(x), x)
    rates = [block.drop_path.rate for block in mae_st.Encoder(**{k: v for k, v in SMALL.items() if "decoder" not in k} | dict(depth=5), drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("size, millions", [("base", 86), ("large", 304), ("huge", 631)])
def test_sizes_have_the_papers_numbers_of_parameters(size, millions):
    with torch.device("meta"):
        model = MaskedAutoencoder(**mae_st.SIZES[size])
    assert int(train.count(model.encoder)) == millions
    assert len(model.decoder_blocks) == 4 and model.decoder_pos.shape == (1569, 512) and model.decoder_blocks[0].attn.heads == 8


def test_the_model_file_imports_torch_alone():
    script = "import sys, importlib.util; from importlib.abc import MetaPathFinder\nclass Block(MetaPathFinder):\n def find_spec(self, name, path, target=None):\n" \
             "  assert name.split('.')[0] not in ('train', 'av', 'tqdm'), name\nsys.meta_path.insert(0, Block())\nimport mae_st"
    subprocess.run([sys.executable, "-c", script], cwd=HERE, check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_the_loss_equals_float64_on_the_cpu(dtype, tolerance, compiled):
    torch.manual_seed(0)
    model = MaskedAutoencoder(**SMALL | dict(dim=128, heads=2, decoder_dim=64, decoder_heads=1))
    video, noise = torch.randint(0, 256, (4, 3, 4, 12, 20), dtype=torch.uint8), mask_noise("agnostic", 4, (2, 3, 5))
    expected = model.double()((video.double() / 255 - 0.45) / 0.225, 0.8, noise)
    gradient = torch.autograd.grad(expected, model.encoder.blocks[0].mlp[0].weight)[0]
    model = model.float().cuda()
    step = torch.compile(model) if compiled else model
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = step(video.cuda(), 0.8, noise.cuda())
    assert abs(loss.item() / expected.item() - 1) < tolerance
    loss.backward()
    own = model.encoder.blocks[0].mlp[0].weight.grad.cpu().double()
    assert ((own - gradient).norm() / gradient.norm()).item() < 10 * tolerance
