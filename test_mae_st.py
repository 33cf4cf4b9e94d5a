"""The specification. Every test compares with a plain loop, a second route or an exact property, on tiny models and
videos that it makes itself. `pytest` runs it all in minutes on two CPU cores; `MAE_LONG=1 pytest` runs the large
numbers: thousands of clips, hundreds of damaged files, dozens of kills.
"""

import argparse
import ast
import contextlib
import errno
import json
import math
import os
import random as pyrandom
import re
import shutil
import signal
import subprocess
import sys
import types
import zipfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see train.py

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import finetune
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
    with pytest.raises(ValueError, match="frames 16.*patches of 0"):
        patchify(torch.zeros(1, 3, 16, 224, 224), (0, 16, 16))
    with pytest.raises(ValueError, match="frames 0"):
        patchify(torch.zeros(1, 3, 0, 224, 224), (2, 16, 16))
    for shape, problem in (((1, 7, 12), "7 patches of 12"), ((1, 8, 13), "8 patches of 13")):
        with pytest.raises(ValueError, match=problem):
            unpatchify(torch.zeros(shape), (1, 2, 2), (2, 2, 2))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("grid", [(8, 14, 14), (3, 5, 7), (4, 4, 4)])
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
        sides = [max(2, math.ceil(length / 4)) for length in grid]
        for b in range(5):
            cubes = [seen[b, i:i + sides[0], j:j + sides[1], k:k + sides[2]] for i in range(0, t, sides[0]) for j in range(0, h, sides[1])
                     for k in range(0, w, sides[2])]
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


@pytest.mark.parametrize("shape", [(5, 2, 6), (5, 2, 2, 3), (5, 3, 1, 1), (5, 2, 2, 2, 1)])
def test_noise_that_does_not_fit_the_grid_is_an_error(shape):
    with pytest.raises(ValueError, match=re.escape(f"{shape} does not fit the grid 2 x 2 x 2")):
        split_tokens(torch.rand(shape), (2, 2, 2), 0.5)


# ------------------------------------------------------------------------------------------------ the model


def plain_block(block, x):
    """One transformer block on one clip's tokens (N, D), written out."""
    D, heads = x.shape[1], block.attn.heads
    d = D // heads
    q, k, v = F.linear(F.layer_norm(x, (D,), block.norm1.weight, block.norm1.bias, 1e-6), block.attn.qkv.weight,
                       block.attn.qkv.bias).split(D, dim=1)
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
                position = encoder.pos_time[ti] + encoder.pos_space[yi * W + xi]
                tokens.append(encoder.embed.weight @ patch.flatten() + encoder.embed.bias + position)
                rows.append(1 + i)
        x = torch.stack(tokens)
        for block in encoder.blocks:
            x = plain_block(block, x)
        x = F.linear(F.layer_norm(x, x.shape[1:], encoder.norm.weight, encoder.norm.bias, 1e-6), model.decoder_embed.weight,
                     model.decoder_embed.bias)
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


def test_decoding_a_share_of_the_hidden_patches_is_decoding_those_of_the_smallest_noise():
    torch.manual_seed(0)
    model, video, noise = MaskedAutoencoder(**SMALL), torch.randn(2, 3, 4, 12, 20), mask_noise("agnostic", 2, (2, 3, 5))
    patches = patchify(video, (2, 4, 4))
    keep, hide = split_tokens(noise, (2, 3, 5), 0.8)
    latent = model.encoder.norm(model.encoder(patches, keep))
    prediction, (target, _) = model.decode(latent, keep, hide[:, :12]), model.targets(patches, hide[:, :12])
    assert_close(model(video, 0.8, noise, decode_ratio=0.5).detach(), F.mse_loss(prediction, target).detach(), 1e-6, "loss")
    assert torch.equal(model(video, 0.8, noise, decode_ratio=1.0), model(video, 0.8, noise))
    with pytest.raises(ValueError, match="decode ratio 0"):
        model(video, 0.8, noise, decode_ratio=0.0)


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


def test_positions_that_start_as_waves_are_sines_and_cosines_of_each_axis():
    model = MaskedAutoencoder(frames=6, height=4, width=10, patch=(2, 2, 2), dim=32, depth=1, heads=2, decoder_dim=16, decoder_depth=1,
                              decoder_heads=1, positions="waves")
    for table, dim in ((model.encoder.positions(), 32), (model.decoder_pos[1:], 16)):
        expected = torch.zeros(3, 2, 5, dim)
        for place in np.ndindex(3, 2, 5):
            at = 0
            for axis, length in enumerate((3, 2, 5)):
                pairs = dim // 8 if axis == 0 else 3 * dim // 16
                for i in range(pairs):
                    period = 2 * length ** (1 - i / (pairs - 1) if pairs > 1 else 1)
                    phase = 2 * math.pi * (place[axis] + 0.5) / period
                    expected[place][at + i], expected[place][at + pairs + i] = math.sin(phase), math.cos(phase)
                at += 2 * pairs
        assert_close(table.view(3, 2, 5, dim), expected, 1e-5, f"positions of width {dim}")
    for start, width in (("waves", 24), ("wave", 32)):
        with pytest.raises(ValueError, match=f"'{start}' of width {width}"):
            mae_st.Encoder(dim=width, heads=2, positions=start)
    normal = mae_st.Encoder(dim=64, heads=2)
    assert 0.015 < normal.pos_space.std() < 0.025


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
    calls = Counter()
    for model in (plain, again):
        model.encoder.blocks[0].register_forward_pre_hook(lambda block, inputs, model=model: calls.update([model]))
        model(video, 0.8, noise).backward()
        model.eval()(video, 0.8, noise).backward()
    assert calls[plain] == 2 and calls[again] == 3  # in training a second time for the backward pass
    for (name, a), b in zip(plain.named_parameters(), again.parameters()):
        assert_close(a.grad, b.grad, 1e-6, name)


def test_drop_path_skips_whole_clips_and_keeps_the_mean():
    drop, x = mae_st.DropPath(0.25), torch.ones(4000, 2, 3)
    y = drop(x)
    kept = y[:, 0, 0] > 0
    assert_close(y[kept], x[kept] / 0.75, 1e-6, "kept clips")
    assert (y[~kept] == 0).all() and abs(kept.float().mean() - 0.75) < 0.04
    assert torch.equal(drop.eval()(x), x)
    rates = [block.drop_path.rate
             for block in mae_st.Encoder(**{k: v for k, v in SMALL.items() if "decoder" not in k} | dict(depth=5), drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("size, millions, dim, depth, heads, decoder", [
    ("base", 86, 768, 12, 12, (512, 4, 8)), ("large", 304, 1024, 24, 16, (512, 4, 8)), ("huge", 632, 1280, 32, 16, (512, 4, 8)),
    ("small", 22, 384, 12, 6, (192, 4, 3)), ("tiny", 1, 128, 2, 4, (64, 1, 2))])
def test_sizes_have_the_papers_shapes_and_numbers_of_parameters(size, millions, dim, depth, heads, decoder):
    with torch.device("meta"):
        model = MaskedAutoencoder(**mae_st.SIZES[size])
    for blocks, width, shape in ((model.encoder.blocks, dim, (dim, depth, heads)), (model.decoder_blocks, decoder[0], decoder)):
        assert (blocks[0].norm1.weight.shape[0], len(blocks), blocks[0].attn.heads) == shape
        assert blocks[0].mlp[0].weight.shape == (4 * width, width)
    assert round(train.count(model.encoder)) == millions and model.decoder_pos.shape == (1569, decoder[0])


def test_the_defaults_are_the_papers_vit_l_on_16_frames_of_224():
    with torch.device("meta"):
        default = MaskedAutoencoder()
        spelt_out = MaskedAutoencoder(frames=16, height=224, width=224, channels=3, patch=(2, 16, 16), target="frame",
                                      **mae_st.SIZES["large"])
        classifier = mae_st.Classifier(classes=400)
    for ours, theirs in ((default, spelt_out), (classifier.encoder, spelt_out.encoder)):
        shapes = [{name: table.shape for name, table in module.named_parameters()} for module in (ours, theirs)]
        assert shapes[0] == shapes[1]
    for encoder in (default.encoder, classifier.encoder):
        assert encoder.blocks[0].attn.heads == 16 and not encoder.checkpointing
        assert {block.drop_path.rate for block in encoder.blocks} == {0}
    assert default.norm_pix and default.target == "frame" and classifier.dropout.p == 0


def test_weights_start_as_xavier_with_bias_0_tokens_small_and_the_head_next_to_nothing():
    torch.manual_seed(0)
    shape = dict(frames=4, height=64, width=64, dim=96, depth=2, heads=2)
    model, classifier = MaskedAutoencoder(**shape, decoder_dim=64, decoder_depth=1, decoder_heads=2), mae_st.Classifier(**shape, classes=50)
    layers = [(name, module) for part in (model, classifier.encoder) for name, module in part.named_modules()]
    linear = [(name, module) for name, module in layers if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 3 + 3 * 4 + 1 + 2 * 4  # embed, embed and pred of the decoder, four a block; the classifier's encoder
    for name, module in linear:
        bound = math.sqrt(6 / sum(module.weight.shape))
        assert 0.99 * bound < module.weight.abs().max() <= bound and (module.bias == 0).all(), name
        assert abs(module.weight.std() * math.sqrt(3) / bound - 1) < 0.03, name
    for name, module in layers:
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
    for name, table in model.named_parameters():
        if "pos_" in name or "token" in name:
            assert 0.013 < table.std() < 0.027 and table.abs().max() < 0.1, f"{name}: {table.std()}"
    assert abs(classifier.head.weight.std() / 2e-5 - 1) < 0.05 and (classifier.head.bias == 0).all()


def test_the_snippet_in_the_readme_runs_and_gives_the_shapes_it_says():
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    names = {}
    for snippet in snippets:
        exec(snippet, names)
    assert len(snippets) == 1 and names["loss"].isfinite()
    assert names["filled"].shape == (2, 3, 8, 224, 224) and names["mask"].shape == (2, 8, 14, 14)
    assert names["tokens"].shape == (2, 1568, 384) and names["cls"].shape == (2, 384)


def test_the_model_file_imports_torch_alone():
    nodes = list(ast.walk(ast.parse((HERE / "mae_st.py").read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} == {"math", "torch"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-3), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)])  # of the gradient
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
    assert abs(loss.item() / expected.item() - 1) < 1e-3
    loss.backward()
    own = model.encoder.blocks[0].mlp[0].weight.grad.cpu().double()
    assert ((own - gradient).norm() / gradient.norm()).item() < tolerance


# --------------------------------------------------------------------------------------------------- videos


def natural_frames(count=40, height=96, width=128, seed=0):
    """Frames with texture and motion, uint8 (T, H, W, 3): enough for encoders to use every kind of picture."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 24, 32)).astype(np.float32))
    world = F.interpolate(coarse, size=(2 * height, 2 * width), mode="bicubic")[0].permute(1, 2, 0).numpy()
    frames = []
    for t in range(count):
        y, x = int(height / 2 * (1 + math.sin(t / 9))), int(width / 2 * (1 + math.cos(t / 11)))
        frame = world[y:y + height, x:x + width].copy()
        frame[(3 * t) % height:(3 * t) % height + 8, :] = 255 * (t % 7) / 6
        frames.append(frame + rng.normal(0, 4, frame.shape))
    return np.clip(frames, 0, 255).astype(np.uint8)


def encode(path, frames, codec="libx264", rate=30, options=None, pix_fmt="yuv420p", pts=None, before=None, aspect=None, rotation=0,
           color_range=None):
    """Write frames to a video file; pts in units of 1/1000 s, if given."""
    with av.open(str(path), "w") as container:
        others = before(container) if before else []
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.codec_context.thread_count = 1  # libvpx's threads wait for each other in loops: for minutes, on a busy machine
        if pts is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        if color_range:
            stream.codec_context.color_range = color_range
        for packet in others:
            container.mux(packet)
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format=pix_fmt, dst_color_range=color_range, threads=1)
            if pts is not None:
                frame.pts, frame.time_base = int(pts[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


class FixedClip:
    """For the tests: given times, the whole picture."""

    def __init__(self, times, flip=False):
        self.fixed, self.flip = np.asarray(times, dtype=float), flip

    def times(self, end):
        return self.fixed

    def box(self, width, height):
        self.upright = width, height
        return (0, 0, 1, 1), self.flip


def full_decode(path):
    """All frames of the main video stream and their seconds, by the plainest code there is."""
    with av.open(path) as container:
        stream = max((s for s in container.streams.video if not s.disposition & train.Disposition.attached_pic), key=lambda s: s.width)
        stream.codec_context.thread_count = 1
        frames = list(container.decode(stream))
        return frames, [float((f.pts - frames[0].pts) * stream.time_base) for f in frames]


def rendered(frames, size, flip=False):
    """Frames through a renderer that has seen nothing before."""
    out = np.empty((len(frames), *size, 3), np.uint8)
    for frame, place in zip(frames, out):
        train.Renderer(FixedClip([0], flip), size, 1.0)(frame, place)
    return out


X264 = dict(preset="medium", crf="30")
CODECS = {
    "H.264, closed groups": ("a.mp4", "libx264", X264 | {"x264-params": "keyint=12:scenecut=0:bframes=3"}, "yuv420p"),
    "H.264, open groups": ("a.mkv", "libx264", X264 | {"x264-params": "keyint=12:scenecut=0:bframes=3:open-gop=1"}, "yuv420p"),
    "H.264, 8 slices": ("a.mp4", "libx264", X264 | {"x264-params": "keyint=12:bframes=3:slices=8"}, "yuv420p"),
    "H.264, intra refresh": ("a.mp4", "libx264", X264 | {"x264-params": "keyint=10:bframes=2:intra-refresh=1"}, "yuv420p"),
    "H.264, interlaced": ("a.mkv", "libx264", X264 | {"x264-params": "keyint=12:bframes=3:tff=1"}, "yuv420p"),
    "H.264, start codes": ("a.ts", "libx264", X264 | {"x264-params": "keyint=12:bframes=3"}, "yuv420p"),
    "H.264, 10 bit": ("a.mp4", "libx264", X264 | {"x264-params": "keyint=12:bframes=3"}, "yuv420p10le"),
    "H.264, 4:4:4": ("a.mp4", "libx264", X264 | {"x264-params": "keyint=12:bframes=3"}, "yuv444p"),
    "HEVC": ("a.mp4", "libx265", {"x265-params": "keyint=12:bframes=4:pools=none:log-level=none", "preset": "fast"}, "yuv420p"),
    "HEVC, open groups, layers": ("a.mkv", "libx265", {"x265-params": "keyint=12:open-gop=1:temporal-layers=2:bframes=4:pools=none:"
                                                                      "log-level=none", "preset": "fast"}, "yuv420p"),
    "VP9": ("a.webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "6", "auto-alt-ref": "1", "lag-in-frames": "10"},
            "yuv420p"),
    "VP8": ("a.webm", "libvpx", {"g": "12", "deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "10"}, "yuv420p"),
    "AV1": ("a.mkv", "libsvtav1", {"g": "12", "preset": "10", "svtav1-params": "irefresh-type=1:lp=1"}, "yuv420p"),
    "MPEG-4 in AVI": ("a.avi", "mpeg4", {"g": "12", "bf": "2", "b": "300k"}, "yuv420p"),
    "H.264 in AVI": ("a.avi", "libx264", X264 | {"x264-params": "keyint=12:bframes=3"}, "yuv420p"),
    "MPEG-4 in MP4": ("a.mp4", "mpeg4", {"g": "12", "bf": "2", "b": "300k"}, "yuv420p"),
    "MPEG-2": ("a.mpg", "mpeg2video", {"g": "12", "bf": "2", "b": "600k"}, "yuv420p"),
    "Motion JPEG": ("a.mkv", "mjpeg", {}, "yuvj420p"),
}


@pytest.mark.parametrize("name", CODECS)
def test_wanted_frames_are_those_of_a_full_decode_bit_for_bit(name, tmp_path):
    file, codec, options, pix_fmt = CODECS[name]
    path = encode(tmp_path / file, natural_frames(48), codec, options=options, pix_fmt=pix_fmt)
    frames, seconds = full_decode(path)
    if file.endswith("avi"):
        seconds = [i / 30 for i in range(len(frames))]  # AVI stores no times
    for start in (0.0, 0.31, 0.8, 1.2):
        clips = [FixedClip(start + np.arange(4) * offset, flip=bool(offset == 0.1)) for offset in (1 / 30, 0.1)]
        got = train.read_clips(path, clips, (48, 64))
        for clip, result in zip(clips, got):
            shown = [max(i for i, s in enumerate(seconds) if s <= t + 1e-3) for t in clip.fixed]
            expected = rendered([frames[i] for i in shown], (48, 64), clip.flip)
            assert np.array_equal(result, expected), f"{name} from {start} s: other frames than {shown}"


@pytest.mark.parametrize("name", sorted(name for name in CODECS if "AVI" not in name))
def test_any_set_of_frames_comes_out_of_one_decode_of_a_part_bit_for_bit(name, tmp_path):
    """Also sets that reach over a key frame, where frames shown before it are decoded after it: with groups of 12, around 24."""
    file, codec, options, pix_fmt = CODECS[name]
    path = encode(tmp_path / file, natural_frames(48), codec, options=options, pix_fmt=pix_fmt)
    frames, seconds = full_decode(path)
    whole, rng = rendered(frames, (48, 64)), np.random.default_rng(0)
    sets = [[a, 23, 24] for a in range(12, 23)] + [sorted(rng.choice(48, rng.integers(2, 7), replace=False))
                                                   for _ in range(400 if LONG else 10)]
    for chosen in sets:
        got = train.read_needed(path, [FixedClip([seconds[i] for i in chosen])], (48, 64))
        assert got is not None and np.array_equal(got[0], whole[chosen]), f"{name}: other frames than {chosen}"


def test_packets_that_nothing_depends_on_are_not_decoded(tmp_path):
    """The speed-up is real: for one late frame of H.264 with B-frames, far fewer frames are decoded than lie before it."""
    path = encode(tmp_path / "a.mp4", natural_frames(48), options=X264 | {"x264-params": "keyint=24:scenecut=0:bframes=3:b-adapt=0"})
    with train.open_video(path) as (container, stream):
        table = train.read_packets(container, stream)
        last = sorted(table.pts)[40]
        decoded = [frame.pts for frame in train.decode_needed(stream.codec_context, table.packets, *train.needed_packets(table, {last}))]
    assert last in decoded and sorted(table.pts)[24] in decoded and min(decoded) >= sorted(table.pts)[24]
    assert len(decoded) <= 12, f"{len(decoded)} frames were decoded"


def nal(kind, layer, size=None):
    """A NAL unit of HEVC, header and three bytes; layers count from 1; size: bytes of the length before it, None for a start code."""
    unit = bytes([kind << 1, layer, 1, 2, 3])
    return (b"\0\0\1" if size is None else len(unit).to_bytes(size, "big")) + unit


@pytest.mark.parametrize("size", [None, 2, 4])
def test_a_picture_of_hevc_may_be_dropped_if_nothing_of_its_layer_needs_it_and_no_layer_is_above(size, tmp_path, monkeypatch):
    for kinds, layer, droppable in (((0,), 1, True), ((1,), 1, False), ((2,), 2, True), ((8, 8), 3, True), ((8, 9), 3, False),
                                    ((14,), 7, True), ((15,), 2, False), ((16,), 1, False), ((19,), 1, False), ((20,), 1, False),
                                    ((32, 33, 34, 39, 0), 1, True)):
        packet = b"".join(nal(kind, layer, size) for kind in kinds)
        assert train.hevc_packet(packet, size or 0) == (kinds[0] in (16, 19, 20), droppable, layer), kinds
    assert train.hevc_packet(nal(39, 1, size), size or 0) == (False, False, 0)  # no picture in it
    file, codec, options, pix_fmt = CODECS["HEVC"]
    path, layers = encode(tmp_path / file, natural_frames(12), codec, options=options, pix_fmt=pix_fmt), iter([1, 3, 2] * 4)
    monkeypatch.setattr(train, "hevc_packet", lambda *_: (False, True, next(layers)))  # unneeded in their own layer, all of them
    with train.open_video(path) as (container, stream):
        assert train.read_packets(container, stream).droppable == [False, True, False] * 4


@pytest.mark.parametrize("name", ["H.264, closed groups", "MPEG-4 in AVI"])
def test_a_file_too_large_to_hold_is_read_twice_and_gives_the_same_clips(name, tmp_path, monkeypatch):
    file, codec, options, _ = CODECS[name]
    path = encode(tmp_path / file, natural_frames(48), codec, options=options)
    clips = [FixedClip(start + np.arange(4) / 10) for start in (0.2, 1.1)]
    held = train.read_clips(path, clips, (48, 64))
    monkeypatch.setattr(train, "HELD_BYTES", 0)
    assert np.array_equal(held, train.read_clips(path, clips, (48, 64)))


@pytest.mark.parametrize("rate", [10, 25, Fraction(30000, 1001), 50, 60])
def test_a_clip_covers_the_same_seconds_at_every_frame_rate(rate, tmp_path):
    count = int(3 * rate)
    bits = (np.arange(count)[:, None] >> np.arange(8) & 1).astype(np.uint8) * 255  # a frame shows its number as eight stripes
    frames = np.broadcast_to(bits.repeat(8, axis=1)[:, None, :, None], (count, 32, 64, 3))
    path = encode(tmp_path / "a.mp4", frames, rate=rate)
    clip = FixedClip(0.2 + np.arange(16) * 4 / 30)
    got = train.read_clips(path, [clip], (32, 64))[0, :, 16, 4::8, 1] > 128  # (16, 8)
    assert (got @ (1 << np.arange(8))).tolist() == [math.floor((t + 1e-3) * rate) for t in clip.fixed]


def test_times_count_from_the_first_frame_and_variable_rates_are_followed(tmp_path):
    pts = 5000 + np.cumsum([0, 33, 33, 200, 10, 10, 100, 33, 33, 33, 400, 33])
    frames = natural_frames(12, 32, 32)
    path = encode(tmp_path / "a.mkv", frames, pts=pts, options={"crf": "10"})
    decoded, seconds = full_decode(path)
    assert_close(np.array(seconds), (pts - 5000) / 1000, 2e-3, "seconds")
    times = [0, 0.05, 0.2, 0.27, 0.28, 0.3, 0.5, 0.9, 5.0]
    expected = [max(i for i in range(12) if (pts[i] - 5000) / 1000 <= t + 1e-3) for t in times]
    assert np.array_equal(train.read_clips(path, [FixedClip(times)], (32, 32))[0], rendered([decoded[i] for i in expected], (32, 32)))


def test_missing_time_stamps_are_counted(tmp_path):
    """A raw H.264 stream has none; its frames are shown at its frame rate, in the order in which the decoder gives them."""
    path = encode(tmp_path / "a.h264", natural_frames(30, 32, 32), rate=25, options={"bf": "2"})
    with av.open(path) as container:
        rate, frames = float(container.streams.video[0].average_rate), list(container.decode(video=0))
    got = train.read_clips(path, [FixedClip(np.arange(5) / 5)], (32, 32))[0]
    assert np.array_equal(got, rendered([frames[math.floor(i / 5 * rate + 1e-6)] for i in range(5)], (32, 32)))


def test_frames_before_the_start_of_an_edit_list_are_not_shown(tmp_path):
    path = encode(tmp_path / "a.mp4", natural_frames(30, 32, 32), pts=np.arange(30) * 40 - 400, options={"bf": "2"})
    with av.open(path) as container:
        assert any(packet.is_discard for packet in container.demux(video=0)), "the file has such an edit list"
    frames, seconds = full_decode(path)
    assert len(frames) == 20 and frames[0].pts == 0
    got = train.read_clips(path, [FixedClip(np.arange(5) / 10)], (32, 32))[0]
    assert np.array_equal(got, rendered([frames[i] for i in train.shown_at(np.arange(5) / 10, seconds)], (32, 32)))


def test_a_video_shorter_than_a_clip_repeats_its_last_frame(tmp_path):
    one = encode(tmp_path / "one.mp4", natural_frames(1, 32, 32))
    clip = train.RandomClip(np.random.default_rng(0), 16, 4)
    got = train.read_clips(one, [clip], (32, 32))[0]
    assert (got == got[:1]).all()
    few = encode(tmp_path / "few.mp4", natural_frames(9, 32, 32))
    got = train.read_clips(few, [FixedClip(np.arange(16) * 4 / 30)], (32, 32))[0]
    assert (got[2:] == got[2]).all() and not (got[1] == got[2]).all()


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_phone_video_comes_out_upright(rotation, tmp_path):
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    frames[:, :16, :16] = 255  # white corner, top left as stored
    path = encode(tmp_path / "a.mp4", frames, rotation=rotation, options={"crf": "1"})
    clip = FixedClip([0])
    got = train.read_clips(path, [clip], (64, 64))[0, 0, :, :, 0]
    bright = {(y, x) for y in (8, 56) for x in (8, 56) if got[y, x] > 128}
    assert bright == {90: {(56, 8)}, 180: {(56, 56)}, 270: {(8, 56)}}[rotation]  # display rotation is counterclockwise
    assert clip.upright == ((64, 32) if rotation == 180 else (32, 64))


def test_pixels_that_are_not_square_are_cropped_as_they_are_shown(tmp_path):
    path = encode(tmp_path / "a.mp4", natural_frames(3, 64, 64), aspect=Fraction(2, 1))
    clip = FixedClip([0])
    train.read_clips(path, [clip], (32, 32))
    assert clip.upright == (128, 64)


@pytest.mark.parametrize("pix_fmt, color_range", [("yuv420p", 1), ("yuv420p", 2), ("yuvj420p", 2), ("yuv444p", 1), ("yuv420p10le", 1)])
def test_colours_come_out_as_they_went_in(pix_fmt, color_range, tmp_path):
    colours = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (6, 35, 51, 3) if pix_fmt == "yuv444p" else (6, 36, 52, 3))
    path = encode(tmp_path / "a.mkv", frames, pix_fmt=pix_fmt, options={"crf": "1"}, color_range=color_range)
    got = train.read_clips(path, [FixedClip(np.arange(6) / 30)], (30, 40))[0]
    assert_close(got.astype(float), np.broadcast_to(colours[:, None, None].astype(float), got.shape).copy(), 8, "colours")


def cover_and_sound(container):
    """Cover art and a sound track, before the video."""
    cover = container.add_stream("mjpeg", rate=1)
    cover.width = cover.height = 512
    cover.pix_fmt, cover.disposition = "yuvj420p", train.Disposition.attached_pic
    return cover.encode(av.VideoFrame.from_ndarray(np.zeros((512, 512, 3), np.uint8), format="rgb24")) + cover.encode(None)


def silence(container):
    sound = container.add_stream("aac", rate=44100, layout="mono")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
    frame.rate, frame.pts = 44100, 0
    return sound.encode(frame) + sound.encode(None)


@pytest.mark.parametrize("before", [cover_and_sound, silence])
def test_the_video_is_found_beside_cover_art_and_sound(before, tmp_path):
    source = natural_frames(6, 32, 48)
    path = encode(tmp_path / "a.mp4", source, before=before, options={"crf": "1"})
    with av.open(path) as container:
        frames = list(container.decode(next(s for s in container.streams.video if s.width == 48)))
    got = train.read_clips(path, [FixedClip([0.1])], (32, 48))[0]
    shown = [i for i in range(6) if np.array_equal(got, rendered([frames[i]], (32, 48)))]
    assert shown == [3], f"frame {shown} of the video came out"


@pytest.mark.parametrize("small_is_default", [False, True])
def test_of_several_video_streams_the_default_one_is_read_or_else_the_largest(small_is_default, tmp_path):
    def small(container):
        stream = container.add_stream("mpeg4", rate=30)
        stream.height = stream.width = 16
        stream.pix_fmt, stream.disposition = "yuv420p", train.Disposition.default if small_is_default else 0
        return stream.encode(av.VideoFrame.from_ndarray(np.full((16, 16, 3), 200, np.uint8), format="rgb24")) + stream.encode(None)

    path = encode(tmp_path / "a.mkv", np.zeros((6, 32, 48, 3), np.uint8), before=small)
    assert train.read_clips(path, [FixedClip([0])], (32, 32)).mean() == pytest.approx(200 if small_is_default else 0, abs=8)


def test_random_crops_stay_within_area_and_aspect_and_starts_within_the_video():
    boxes, flips = [], []
    for seed in range(300):
        clip = train.RandomClip(np.random.default_rng(seed), 16, 4)
        (x, y, w, h), flip = clip.box(340, 256)
        boxes.append((x, y, w * h, math.log(w * 340 / (h * 256))))
        flips.append(flip)
        assert 0 <= x and 0 <= y and x + w <= 1 + 1e-9 and y + h <= 1 + 1e-9
        assert 0.5 - 1e-9 <= w * h <= 1 and 3 / 4 - 1e-9 <= w * 340 / (h * 256) <= 4 / 3 + 1e-9
        times = clip.times(np.arange(301) / 30)
        assert times[0] >= 0 and times[-1] <= 10 and np.allclose(np.diff(times), 4 / 30)
    x, y, area, aspect = np.array(boxes).T
    for numbers, low, high in ((x, 0.01, 0.3), (y, 0.01, 0.2), (area, 0.52, 0.9), (aspect, math.log(0.8), math.log(1.25))):
        # all of the range
        assert numbers.min() <= low and numbers.max() >= high, (numbers.min(), numbers.max())
    assert abs(np.mean(flips) - 0.5) < 0.1


@pytest.mark.parametrize("width, height, expected", [(1000, 100, (1 - 0.4 / 3, 0, 0.4 / 3, 1)), (100, 1000, (0, 1 - 0.4 / 3, 1, 0.4 / 3))])
def test_of_a_picture_too_long_for_any_random_crop_the_middle_is_taken(width, height, expected):
    (x, y, w, h), _ = train.RandomClip(np.random.default_rng(0), 16, 4).box(width, height)
    assert (2 * x, 2 * y, w, h) == pytest.approx(expected)
    assert max(w * width / (h * height), h * height / (w * width)) == pytest.approx(4 / 3)


def bad_files(folder):
    """Files that are no videos, each with a word that must stand in the message."""
    good = encode(folder / "good.mp4", natural_frames(12, 32, 32))
    data = Path(good).read_bytes()
    (folder / "text.mp4").write_text("this is a text\n" * 100)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes(data[:len(data) // 2])
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    (folder / "m3u.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:{good}\n#EXT-X-ENDLIST\n")
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        for packet in silence(container):
            container.mux(packet)
    return ["text.mp4", "empty.mp4", "cut.mp4", "list.mp4", "m3u.mp4", "folder.mp4", "pipe.mp4", "sound.mp4", "missing.mp4"]


def test_files_that_are_no_videos_are_refused_with_a_reason(tmp_path):
    names = bad_files(tmp_path)
    with av.open(str(tmp_path / "list.mp4")) as container:
        assert len(list(container.decode(video=0))) == 12, "the playlist is no danger, so this proves nothing"
    for name in names:
        with pytest.raises(train.BadVideo) as caught:
            train.read_clips(str(tmp_path / name), [FixedClip([0])], (32, 32))
        assert str(caught.value).strip() and "\n" not in str(caught.value), name


def test_huge_frames_are_refused(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", natural_frames(2, 64, 64))
    monkeypatch.setattr(train, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(train.BadVideo, match="64 x 64"):
        train.read_clips(path, [FixedClip([0])], (32, 32))


def test_a_file_is_decoded_by_one_thread(tmp_path):
    with train.open_video(encode(tmp_path / "a.mp4", natural_frames(2, 64, 64))) as (_, stream):
        assert stream.codec_context.thread_count == 1


def test_damaged_files_decode_or_are_reported(tmp_path):
    """Bits flipped, cut, zeroed, spliced: never a crash, a hang or a wrong shape."""
    rng = np.random.default_rng(0)
    sources = []
    for name in ("H.264, closed groups", "HEVC", "VP9", "AV1", "MPEG-4 in AVI", "MPEG-2"):
        file, codec, options, pix_fmt = CODECS[name]
        path = encode(tmp_path / f"{len(sources)}{file}", natural_frames(24, 48, 64), codec, options=options, pix_fmt=pix_fmt)
        sources.append(Path(path).read_bytes())
    outcomes = {"decoded": 0, "reported": 0}
    for trial in range(500 if LONG else 30):
        data = bytearray(sources[trial % len(sources)])
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 200))
        kind = trial // len(sources) % 4
        if kind == 0:
            for place in rng.integers(len(data), size=20):
                data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at + length] = bytes(len(data[at:at + length]))
        else:
            data[at:at + length] = data[:length] if trial % 2 else sources[(trial + 1) % len(sources)][at:at + length]
        (tmp_path / "damaged").write_bytes(data)
        try:
            clips = [train.RandomClip(np.random.default_rng((trial, i)), 4, 4) for i in range(2)]
            assert train.read_clips(str(tmp_path / "damaged"), clips, (32, 32)).shape == (2, 4, 32, 32, 3)
            outcomes["decoded"] += 1
        except train.BadVideo as reason:
            assert str(reason)
            outcomes["reported"] += 1
    print(outcomes)
    assert min(outcomes.values()) > 0


def test_thousands_of_clips_leave_descriptors_threads_and_memory_as_they_were(tmp_path):
    paths = [encode(tmp_path / f"{name}.{file}", natural_frames(24, 48, 64), codec, options=options)
             for name, (file, codec, options, _) in CODECS.items()
             if name in ("H.264, closed groups", "VP9", "MPEG-4 in AVI")] + [str(tmp_path / "bad.mp4")]
    Path(paths[-1]).write_bytes(Path(paths[0]).read_bytes()[:3000])

    def usage():
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), resident

    total, settled = (3000, 300) if LONG else (300, 100)
    for k in range(total):
        if k == settled:
            before = usage()
        with contextlib.suppress(train.BadVideo):
            train.read_clips(paths[k % 4], [train.RandomClip(np.random.default_rng(k), 4, 4)], (32, 32))
    after = usage()
    print(f"descriptors, threads, MB: {before} after {settled} clips, {after} after {total}")
    assert after[:2] == before[:2] and after[2] < before[2] + 8


# ------------------------------------------------------------------------------------------ lists and batches


@pytest.mark.parametrize("line, entry", [
    ("a.mp4", ("a.mp4", None)), ("a.mp4 3", ("a.mp4", "3")), ("a.mp4,3", ("a.mp4", "3")), ("my dir/a b.MP4 7", ("my dir/a b.MP4", "7")),
    ("a,b.webm, playing guitar", ("a,b.webm", "playing guitar")), ('"a, b.mp4",5', ("a, b.mp4", "5")), ("a.mp4\t2 ", ("a.mp4", "2")),
    ("a.mp4 copy.mp4 3", ("a.mp4 copy.mp4", "3")), ("strange 4", ("strange", "4")), ("strange", ("strange", None)),
    ("a.mp4v 3", ("a.mp4v", "3")), ('my "best".mp4 3', ('my "best".mp4', "3"))])
def test_lines_of_a_list_file_are_read_as_meant(line, entry):
    assert train.parse_line(line) == entry


def test_a_folder_and_a_list_of_it_hold_the_same_videos(tmp_path, capsys):
    for name in ("b/two.mp4", "a/one.mp4", "a/x y.avi", "a/notes.txt"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    (tmp_path / "set" / "README").touch()
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "b").rename(tmp_path / "elsewhere")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    folder = train.list_videos(tmp_path / "set")
    assert "1 x .txt" in capsys.readouterr().out
    (tmp_path / "list.csv").write_bytes("\ufeffset/a/one.mp4 a\r\n\r\nset/a/x y.avi a\r\nset/b/two.mp4,b\r\n".encode())
    listed = train.list_videos(tmp_path / "list.csv")
    expected = [str(tmp_path / "set" / name) for name in ("a/one.mp4", "a/x y.avi", "b/two.mp4")]
    assert [listed[i] for i in range(len(listed))] == [folder[i] for i in range(len(folder))] == expected
    assert listed.labels == folder.labels == ["a", "a", "b"]
    for name in ("stray.mp4", "a/._one.mp4"):  # a video beside the class folders, and what macOS writes beside a video
        (tmp_path / "set" / name).touch()
    folder = train.list_videos(tmp_path / "set")
    assert len(folder) == 4 and "left out: 1 x README, 1 x .mp4, 1 x .txt" in capsys.readouterr().out
    with pytest.raises(train.InputError, match="stray.mp4 lies in no sub-folder"):
        finetune.find_classes(folder, str(tmp_path / "set"))


def test_the_checksum_of_a_list_stays_when_the_data_move():
    names = "run/3.mp4", "walk/1.mp4", "run/9.mp4"  # the first and the last lie deeper together than all of them
    for some in (names, names[:1], names[::2]):
        here, there = (train.VideoList([f"{root}/{name}" for name in some]).checksum() for root in ("/a/data", "/mnt/b/data"))
        assert here == there
    one, other = (train.VideoList([f"/a/{name}" for name in some]).checksum() for some in (names, names[::-1]))
    assert one != other


def test_lists_in_any_shape_give_videos_or_one_clear_line(tmp_path):
    """Fuzz: whatever the list holds, it is read or refused in one line."""
    rng = pyrandom.Random(0)
    pieces = [b"a.mp4", b" ", b",", b"\t", b'"', b"\r\n", b"\n", b"\xff\xfe", b"\xef\xbb\xbf", b"x" * 10000, b"/", b"..",
              "\u00e9\u4e2d".encode(), b"3", b"label", b"\0", b".avi"]
    for trial in range(2000 if LONG else 300):
        (tmp_path / "list.txt").write_bytes(b"".join(rng.choice(pieces) for _ in range(rng.randrange(12))))
        try:
            videos = train.list_videos(tmp_path / "list.txt", say=lambda *_: None)
            assert len(videos) > 0 and all(isinstance(videos[i], str) for i in range(len(videos)))
        except train.InputError as error:
            assert "\n" not in str(error)


@pytest.fixture(scope="module")
def some_videos(tmp_path_factory):
    """Seven small videos with labels, and the folder."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(7):
        train.write_video(folder / f"{i}.mp4", train.moving_shapes(np.random.default_rng(i), train.MOVES[i], "red", 20, 32), 30)
    return folder


def make_clips(folder, **changes):
    return train.VideoClips(train.list_videos(folder),
                            **dict(seed=3, repeat=2, frames=4, stride=2, size=(16, 16), noise=("agnostic", (2, 2, 2))) | changes)


def same_batches(a, b):
    return len(a) == len(b) and all(torch.equal(x[key], y[key]) for x, y in zip(a, b) for key in ("video", "noise", "index"))


def test_the_same_samples_give_the_same_bytes_with_any_number_of_workers_and_processes(some_videos):
    clips = make_clips(some_videos)

    def batches(workers, rank=0, world=1, batch_size=4):
        sampler = train.StepSampler(range(3), batch_size, 2, rank, world)
        return list(train.clip_batches(clips, sampler, workers, torch.device("cpu"), 60))

    alone = batches(0)
    assert same_batches(alone, batches(1)) and same_batches(alone, batches(3))
    ranks = [batches(1, rank, 2, batch_size=2) for rank in range(2)]
    merged = [{key: torch.cat([r0[key], r1[key]]) for key in ("video", "noise", "index")} for r0, r1 in zip(*ranks)]
    assert same_batches(alone, merged)
    assert not torch.equal(alone[0]["video"][0], alone[0]["video"][1]), "the repeats of a video are different clips"


def test_workers_are_a_share_of_the_cpus_within_reason(monkeypatch):
    monkeypatch.setattr(train, "available_cpus", lambda: 192)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    asked = (None, gpu, 8), (None, gpu, 1), (None, gpu, 500), (0, gpu, 8), (None, cpu, 1)
    assert [train.choose_workers(*given)[0] for given in asked] == [24, 32, 1, 0, 1]


def test_an_error_in_a_data_worker_is_told_with_its_reason():
    told = "worker process 0.* ... RuntimeError: the reason. Expected were a.mp4, b.mp4. Take"
    with pytest.raises(train.InputError, match=told), train.data_errors_explained(lambda: ["a.mp4", "b.mp4"]):
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n"
                           "Traceback (most recent call last):\nRuntimeError: the reason")


def test_every_pass_takes_every_video_once_in_a_new_order(some_videos):
    clips = make_clips(some_videos)
    passes = [[clips.video_of(k) for k in range(turn * 7, turn * 7 + 7)] for turn in range(3)]
    assert all(sorted(one) == list(range(7)) for one in passes) and passes[0] != passes[1] != passes[2]


def test_a_bad_video_is_replaced_by_the_same_other_one_every_time(some_videos, tmp_path):
    paths = [str(some_videos / f"{i}.mp4") for i in range(7)] + [str(tmp_path / "missing.mp4")]
    clips = make_clips(some_videos)
    clips.videos = train.VideoList(paths)
    bad = next(k for k in range(8) if clips.video_of(k) == 7)
    one, two = clips[bad], clips[bad]
    assert one["bad"][0][0] == 7 and "No such file" in one["bad"][0][1]
    assert 0 <= one["index"] < 7 and torch.equal(one["video"], two["video"]) and one["index"] == two["index"]


def test_a_list_that_is_mostly_wrong_stops_the_run_with_the_first_reasons(some_videos, tmp_path):
    clips = make_clips(some_videos)
    clips.videos = train.VideoList([str(some_videos / "0.mp4")] + [str(tmp_path / f"missing{i}.mp4") for i in range(9)])
    skipped = train.Skipped(clips.videos, train.Machine(torch.device("cpu"), 0, 1, 1))
    with pytest.raises(train.InputError, match="probably wrong.*missing"):
        for k in range(30):
            skipped.note(train.collate([clips[k]]))


@pytest.mark.parametrize("outcomes, stopped_at", [("b" * 8, 8), ("b" * 7 + "g" * 20, None), ("gb" * 90, None), ("g" * 56 + "b" * 100, None),
                                                  ("ggg" + "b" * 8, 11)])
def test_a_run_stops_when_of_its_first_64_videos_eight_and_more_than_half_are_bad(outcomes, stopped_at):
    skipped = train.Skipped([f"{i}.mp4" for i in range(200)], train.Machine(torch.device("cpu"), 0, 1, 1))
    for i, outcome in enumerate(outcomes, start=1):
        one = dict(index=torch.tensor([0] if outcome == "g" else []), bad=[(i, "broken")] if outcome == "b" else [])
        with pytest.raises(train.InputError, match=f"^8 of the first {i} videos") if i == stopped_at else contextlib.nullcontext():
            skipped.note(one)


def test_a_long_list_is_one_block_of_bytes():
    paths = [f"/data/kinetics/train/class {i % 400}/{i:06d}.mp4" for i in range(300_000)]
    videos = train.VideoList(paths)
    assert len(videos) == 300_000 and all(videos[i] == paths[i] for i in range(0, 300_000, 997))
    assert isinstance(videos.block, bytes) and videos.ends.dtype == np.int64


@pytest.mark.parametrize("move", train.MOVES)
def test_a_generated_scene_moves_as_its_class_says(move):
    """Least squares for the velocity from what changes where the picture is sloped (Lucas and Kanade); shapes have steep edges and are
    left out."""
    angle, velocities = train.MOVES.index(move) * math.pi / 4, []
    for seed, colour in enumerate(train.COLOURS):
        video = train.moving_shapes(np.random.default_rng(seed), move, colour, 12, 64).astype(float).mean(-1)  # (T, H, W)
        middle, change = (video[1:] + video[:-1]) / 2, np.diff(video, axis=0)
        down, across = np.gradient(middle, axis=(1, 2))
        smooth = (np.hypot(down, across) < 20) & (abs(change) < 30)
        (x, y), *_ = np.linalg.lstsq(np.stack([across[smooth], down[smooth]], 1), -change[smooth], rcond=None)
        velocities.append((x, -y))  # pixels a frame, y upwards
        turned = (math.atan2(-y, x) - angle + math.pi) % (2 * math.pi) - math.pi
        assert abs(turned) < math.radians(22.5) and 0.6 < math.hypot(x, y) < 2.2, velocities


def test_a_written_video_has_every_frame_as_it_was(tmp_path):
    frames = train.moving_shapes(np.random.default_rng(0), "up", "red", 7, 48)
    train.write_video(tmp_path / "a.mp4", frames, 30, {"crf": "1"})
    with av.open(str(tmp_path / "a.mp4")) as container:
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 30
    assert len(read) == 7 and abs(np.stack(read).astype(int) - frames).mean() < 4


def test_generated_videos_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(path, *_, **__):
        path.touch()
        if path.name == "0001.mp4":
            raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(train, "write_video", full)
    with pytest.raises(train.InputError, match="No space left on device; make room"):
        train.generate_videos(tmp_path / "data", per_class=2, held_out=1, frames=8, size=32)
    assert not list(tmp_path.iterdir())


def test_generated_videos_are_the_same_files_every_time(tmp_path):
    for name in ("a", "b"):
        train.generate_videos(tmp_path / name, per_class=1, held_out=1, frames=8, size=32)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.mp4"))
    assert len(files) == 16
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert [p.name for p in tmp_path.iterdir() if "unfinished" in p.name] == []
    for i in range(2):  # as long and as large as they are used: libx264's choices may differ there, and not in short ones
        video = train.moving_shapes(np.random.default_rng(i), "up", "cyan", 48, 64)
        for name in "vwxyz":
            train.write_video(tmp_path / name, video, 30, {"crf": "18", "preset": "veryfast"})
        assert len({(tmp_path / name).read_bytes() for name in "vwxyz"}) == 1
    (tmp_path / "b" / "val_colours.csv").unlink()
    with pytest.raises(train.InputError, match="holds other videos"):
        train.generate_videos(tmp_path / "b")


def test_the_second_list_of_the_generated_videos_names_the_colour_of_the_shapes(tmp_path):
    """The colour of the list is the one that most pixels of the video come near to; shapes may be out of sight, and scenes coloured."""
    train.generate_videos(tmp_path / "data", per_class=3, held_out=1, frames=16, size=48)
    right = []
    for part, count in (("train", 24), ("val", 8)):
        by_looks = train.list_videos(tmp_path / "data" / f"{part}_colours.csv")
        assert sorted(by_looks[i] for i in range(count)) == sorted(str(path) for path in (tmp_path / "data" / part).rglob("*.mp4"))
        for i in range(count):
            with av.open(by_looks[i]) as container:
                pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).reshape(-1, 3).astype(int)
            near = {name: (abs(pixels - colour).max(1) < 50).sum() for name, colour in train.COLOURS.items()}
            right.append(max(near, key=near.get) == by_looks.labels[i])
    assert sum(right) >= 24, right


# -------------------------------------------------------------------------------------------------- training


def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine_to_zero():
    rates = [train.learning_rate(step, 100, 2.0, 0.2) for step in range(101)]
    assert_close(np.diff(rates[:20]), np.full(19, 2 / 21), 1e-12, "warm-up")
    assert rates[20] == 2.0 and rates[60] == pytest.approx(1.0) and rates[100] == pytest.approx(0)


def test_weight_decay_spares_biases_and_norms():
    model = MaskedAutoencoder(**SMALL)
    groups = train.decay_groups(model, 0.05)
    decayed, spared = ({id(p) for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    for name, parameter in model.named_parameters():
        assert id(parameter) in (spared if name.endswith("bias") or "norm" in name else decayed), name


def test_with_data_the_defaults_are_the_papers_recipe():
    given = vars(train.parse_arguments(["--data", "videos"]))
    paper = dict(model="large", frames=16, stride=4, size=(224, 224), patch=(2, 16, 16), mask_ratio=0.9, strategy="agnostic",
                 target="frame", norm_pix=True,
                 epochs=200, steps=None, repeat=4, accum=1, lr=1.6e-3, warmup=0.15, weight_decay=0.05, clip=0.02, checkpointing=False)
    assert {key: given[key] for key in paper} == paper and train.Pretraining.BETAS == (0.9, 0.95)
    clips = train.VideoClips(["a.mp4"], seed=0, repeat=4, frames=16, stride=4, size=(224, 224))
    assert clips.area == (0.5, 1) and clips.flip
    for device, batch_size, compiled in (("cuda", 16, True), ("cpu", 2, False)):
        args = train.parse_arguments(["--data", "videos"])
        train.complete(args, train.Machine(torch.device(device), 0, 1, 1))
        assert (args.batch_size, args.compile) == (batch_size, compiled)
    common = dict(frames=16, stride=4, size=(224, 224), patch=(2, 16, 16), sampling="clip", lr=4.8e-3, weight_decay=0.05, clip=5,
                  mixup=0.8, cutmix=1, smoothing=0.1, rand_augment=7, erase=0.25, flip=True, crop=0.08, views=(7, 3))
    for size, recipe in (("base", dict(epochs=75, repeat=2, layer_decay=0.65, drop_path=0.1, dropout=0.3)),
                         ("large", dict(epochs=50, repeat=2, layer_decay=0.75, drop_path=0.2, dropout=0.3)),
                         ("huge", dict(epochs=75, repeat=1, layer_decay=0.8, drop_path=0.2, dropout=0.5))):
        args = finetune.parse_arguments(["--data", "videos", "--init", "last.pt"])
        trained = dict(model_args=mae_st.SIZES[size] | dict(frames=16, height=224, width=224, patch=(2, 16, 16)))
        finetune.fill_in(args, train.Machine(torch.device("cpu"), 0, 1, 1), trained)
        wanted = common | recipe | dict(model=size, warmup=5 / recipe["epochs"])
        assert {key: getattr(args, key) for key in wanted} == wanted
    args = finetune.parse_arguments(["--data", "videos", "--scratch"])
    finetune.fill_in(args, train.Machine(torch.device("cpu"), 0, 1, 1), None)
    assert args.layer_decay == 1 and args.model == "large" and args.drop_path == 0.2
    probe = vars(finetune.parse_arguments(["--data", "videos", "--init", "last.pt", "--probe"]))
    assert all(probe[key] == 0 for key in "drop_path dropout mixup cutmix smoothing rand_augment erase weight_decay".split())
    assert finetune.Finetuning.BETAS == (0.9, 0.999)


def test_steps_rates_and_passes_follow_from_the_batch_as_the_first_lines_say(some_videos, tmp_path, capsys):
    for more, steps, warmup in ((["--epochs", "36"], 42, 6), (["--steps", "10", "--warmup", "0.5"], 10, 5)):  # ceil(36 * 7 / 6) = 42
        args = train.parse_arguments(arguments(some_videos, tmp_path, "--accum", "3", "--target", "patch", "--no-norm-pix", *more))
        machine = train.Machine(torch.device("cpu"), 0, 1, 1)
        train.complete(args, machine)
        run = train.Pretraining(args, machine)
        assert run.steps == steps and run.peak_lr == pytest.approx(0.5 * 6 / 512)
        assert run.model.target == "patch" and not run.model.norm_pix and not run.scaler.is_enabled()
        run.report()
        said = capsys.readouterr().out
        for line in ("videos: 7, the first as read: " + "; ".join(f"{some_videos}/{i}.mp4 (no label)" for i in range(3)),
                     "sees 2 of 8 tokens, 75.0% hidden (agnostic)",
                     "batch: 2 videos x 3 micro-batches x 1 process(es) = 6 videos a step, x 2 clips = 12 clips",
                     f"length: {steps} steps = {steps * 6 / 7:.1f} passes over the list = {steps * 12 / 7:.1f} effective epochs, "
                     f"warm-up {warmup} steps; "
                     f"lr 0.5 x 6 / 512 = {0.5 * 6 / 512:.3g}; a checkpoint every 2 steps"):
            assert line in said, line
        assert "more videos than there are" not in said
    args.batch_size = 7
    train.Pretraining(args, machine).report()
    assert "each is taken about 3.0 times a step" in capsys.readouterr().out


def test_a_gradient_that_is_not_finite_moves_nothing():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for value in (1.0, math.nan, 2.0):
        before = [p.detach().clone() for p in model.parameters()]
        loss = (model(torch.ones(1, 3)) * value).sum()
        loss.backward()
        train.update(optimizer, scaler, model.parameters(), 0.02, loss.detach())
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert moved == math.isfinite(value) and all(torch.isfinite(p).all() for p in model.parameters())
    assert all(state["step"] == 2 for state in optimizer.state.values())


TINY = ("--model tiny --frames 4 --stride 2 --size 16 --patch 2x8x8 --mask-ratio 0.75 --repeat 2 --batch-size 2 --lr 0.5 --device cpu "
        "--save-every 2").split()


def arguments(folder, out, *more):
    return ["--data", str(folder), "--out", str(out), *TINY, *more]


@pytest.fixture(autouse=True)
def signals_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def tensors(path):
    """Model and optimizer state of a checkpoint, as one flat dict."""
    content = train.read_checkpoint(path)
    flat = dict(content["model"])
    for index, state in content["optimizer"]["state"].items():
        flat |= {f"optimizer {index} {key}": value for key, value in state.items()}
    return flat | {"step": torch.tensor(content["step"])}


def assert_same_run(a, b, tolerance=0.0):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for key in a:
        assert_close(a[key], b[key], tolerance, key)


def run_script(*command, check=0, timeout=120, cwd=HERE):
    """Run a script of this repository and look at its exit status; whatever happens, nothing of it stays behind."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == check, f"exit status {process.returncode}\n{out}\n{err}"
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def torchrun(*command, processes=2, **options):
    return run_script("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command, **options)


def test_the_log_tells_how_long_a_step_takes_and_what_share_of_it_there_was_no_batch(some_videos, tmp_path, monkeypatch):
    """On a clock of its own: a batch takes 1 s to come, a micro-batch 2 s to compute, the update 4 s, the pictures 100 s."""
    now = [0.0]

    def taking(seconds, function):
        def slow(*args, **options):
            now[0] += seconds
            return function(*args, **options)
        return slow
    monkeypatch.setattr(train, "mark", lambda device: now[0])
    monkeypatch.setattr(train, "clip_batches", lambda *args, make=train.clip_batches: map(taking(1, lambda batch: batch), make(*args)))
    monkeypatch.setattr(train.Pretraining, "loss", taking(2, train.Pretraining.loss))
    monkeypatch.setattr(train, "update", taking(4, train.update))
    monkeypatch.setattr(train, "write_pictures", taking(100, train.write_pictures))
    assert train.main(arguments(some_videos, tmp_path, "--steps", "4", "--save-every", "2", "--accum", "3", "--workers", "0")) == 0
    for step, line in enumerate((tmp_path / "log.jsonl").read_text().splitlines(), start=1):
        row = json.loads(line)
        assert row["data_wait"] == pytest.approx(3 / 13, abs=1e-6) and row["clips_per_s"] == pytest.approx(3 * 2 * 2 / 13, abs=1e-6)
        assert list(row) == "step epoch loss lr grad_norm clips_per_s data_wait peak_mem_gb".split()
        assert row["step"] == step and row["epoch"] == pytest.approx(step * 6 / 7, abs=1e-6) and row["peak_mem_gb"] is None


def plain_steps(model, loss_of, scale_of, rates, batches, betas, clip):
    """A loop anybody would write: no accumulation, no fused optimizer, no autocast. Yields loss and gradient norm.

    scale_of(name of a parameter) -> its learning rate, relative to the others'.
    """
    optimizer = torch.optim.AdamW([dict(params=[parameter], weight_decay=0.0 if parameter.dim() == 1 else 0.05, scale=scale_of(name))
                                   for name, parameter in model.named_parameters()], betas=betas, foreach=False)
    for rate, batch in zip(rates, batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
        for g in gradients:
            g *= min(1, clip / norm)
        optimizer.step()
        yield loss.item(), norm


def assert_run_is(folder, model, steps):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for row, (loss, norm) in zip([row for row in rows if "loss" in row], steps, strict=True):
        assert (row["loss"], row["grad_norm"]) == pytest.approx((loss, norm), rel=1e-4)
    for key, tensor in train.read_checkpoint(folder / "last.pt")["model"].items():
        assert_close(tensor, model.state_dict()[key], 2e-5, key)


def test_a_run_is_nothing_but_a_plain_loop_over_its_samples(some_videos, tmp_path, capsys):
    assert train.main(arguments(some_videos, tmp_path, "--steps", "4", "--accum", "2", "--workers", "0", "--warmup", "0.5")) == 0
    torch.manual_seed(0)
    model = MaskedAutoencoder(**mae_st.SIZES["tiny"], frames=4, height=16, width=16, patch=(2, 8, 8))
    clips = train.VideoClips(train.list_videos(some_videos), seed=0, repeat=2, frames=4, stride=2, size=(16, 16),
                             noise=("agnostic", (2, 2, 2)))
    items = [[clips[4 * step + i] for i in range(4)] for step in range(4)]  # two micro-batches of two videos
    batches = [(torch.cat([item["video"] for item in four]).permute(0, 4, 1, 2, 3), 0.75, torch.cat([item["noise"] for item in four]))
               for four in items]
    rates = [0.5 * 4 / 512 * share for share in (1 / 3, 2 / 3, 1, 0.5)]
    assert_run_is(tmp_path, model, plain_steps(model, model, lambda name: 1, rates, batches, (0.9, 0.95), 0.02))
    model.decoder_pred.weight.data.zero_()
    model.decoder_pred.bias.data.zero_()  # normalised patches have a mean of 0
    video, ratio, noise = batches[0]
    said = re.search(r"loss of always predicting the mean: (.*) on the first batch", capsys.readouterr().out).group(1)
    assert float(said) == pytest.approx(model(video[:4], ratio, noise[:4]).item(), abs=1e-4)


def test_precision_is_chosen_by_the_device_and_what_is_asked(some_videos, tmp_path, monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    losses = {}
    for amp in ("auto", "off", "bf16"):
        train.main(arguments(some_videos, tmp_path / amp, "--steps", "1", "--workers", "0", "--amp", amp))
        losses[amp] = json.loads((tmp_path / amp / "log.jsonl").read_text())["loss"]
    assert losses["auto"] == losses["off"] and 1e-5 < abs(losses["bf16"] - losses["off"]) < 1e-2
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    chosen = [train.choose_precision(amp, gpu)[0] for amp in ("auto", "bf16", "fp16", "off")]
    assert chosen == [torch.bfloat16, torch.bfloat16, torch.float16, None]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert train.choose_precision("auto", gpu)[0] is None and "fp16 is faster" in train.choose_precision("auto", gpu)[1]
    for major, name in ((8, "float32 (TF32)"), (7, "float32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        assert train.precision_name(None, gpu) == name
    assert [train.precision_name(dtype, cpu) for dtype in (None, torch.bfloat16)] == ["float32", "bfloat16"]


def test_a_compiled_run_is_the_same_run_and_is_compiled_once(some_videos, tmp_path, monkeypatch):
    """The whole loop, with saving and pictures in between; without a compiler behind it, so that it takes no minute."""
    monkeypatch.setattr(torch, "compile", lambda model, compile=torch.compile: compile(model, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for name, flag in (("plain", "--no-compile"), ("compiled", "--compile")):
        assert train.main(arguments(some_videos, tmp_path / name, "--steps", "5", "--workers", "0", flag)) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert train.read_checkpoint(tmp_path / "compiled" / "last.pt")["step"] == 5  # though 2 does not divide it
    assert_same_run(tmp_path / "plain" / "last.pt", tmp_path / "compiled" / "last.pt", tolerance=1e-6)


def test_four_steps_equal_two_and_two_with_another_number_of_workers(some_videos, tmp_path):
    assert train.main(arguments(some_videos, tmp_path / "whole", "--steps", "4", "--workers", "1")) == 0
    first = train.Pretraining.check_step

    def stop_after_two(self, step, *numbers):
        if step == 2:
            raise KeyboardInterrupt
        return first(self, step, *numbers)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Pretraining, "check_step", stop_after_two)
        train.main(arguments(some_videos, tmp_path / "parts", "--steps", "4", "--workers", "1"))
    assert train.read_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 2
    assert train.main(arguments(some_videos, tmp_path / "parts", "--steps", "4", "--workers", "0")) == 0
    assert_same_run(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")
    rows = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "parts")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert list(rows[0][0]) == ["step", "epoch", "loss", "lr", "grad_norm", "clips_per_s", "data_wait", "peak_mem_gb"]


@pytest.fixture(scope="module")
def two_processes(some_videos, tmp_path_factory):
    """The folder of a run of two processes, two micro-batches each: 8 videos a step, more than the 7 there are."""
    out = tmp_path_factory.mktemp("two")
    torchrun("train.py", *arguments(some_videos, out, "--steps", "8", "--accum", "2"))
    return out


def test_two_processes_accumulating_equal_one_process(some_videos, two_processes, tmp_path, capsys):
    assert train.main(arguments(some_videos, tmp_path, "--steps", "8", "--batch-size", "8")) == 0
    assert "taken about 1.1 times a step" in capsys.readouterr().out
    losses = [[json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()] for out in (tmp_path, two_processes)]
    assert_close(np.array(losses[0]), np.array(losses[1]), 2e-5, "losses")
    a, b = tensors(tmp_path / "last.pt"), tensors(two_processes / "last.pt")
    for key in a:  # AdamW divides by the size of the gradient, so a rounding error can grow to a part of the learning rate
        assert_close(a[key], b[key], 5e-4, key)


def test_pictures_show_original_masked_and_reconstruction(some_videos, tmp_path):
    train.main(arguments(some_videos, tmp_path / "run", "--steps", "2"))
    assert train.main(["--reconstruct", str(some_videos / "0.mp4"), "--init", str(tmp_path / "run/last.pt"), "--out",
                       str(tmp_path / "show"), "--device", "cpu"]) == 0
    for folder in ("run", "show"):
        with av.open(str(tmp_path / folder / "reconstruction.png")) as container:
            image = next(container.decode(video=0)).to_ndarray(format="rgb24")
        caption = len(image) - 4 * 3 * 96  # four clips in three rows, two frames enlarged sixfold
        assert caption > 0 and caption % 16 == 0 and image.shape[1] == 2 * 96
        original, masked = image[caption:caption + 96].astype(int), image[caption + 96:caption + 192].astype(int)
        gray = (masked == 128).all(-1)
        assert 0.5 < gray.mean() < 1 and abs(original - masked)[~gray].max() == 0
        with av.open(str(tmp_path / folder / "reconstruction.mp4")) as container:
            frame = next(container.decode(video=0))
            assert (frame.height - 4 * 96) % 16 == 0 and frame.width == 3 * 96
    video = torch.randint(256, (1, 3, 4, 12, 20), dtype=torch.uint8)
    for target, shown in (("frame", video[:, :, ::2]), ("patch", video)):
        model = MaskedAutoencoder(**SMALL, target=target).train(target == "patch")
        pixels, masked, filled = train.picture_frames(model, video, 0.5, torch.rand(1, 2, 3, 5))
        assert np.array_equal(pixels, shown.permute(0, 2, 3, 4, 1)) and masked.shape == filled.shape == pixels.shape
        assert model.training == (target == "patch")


def test_wrong_input_is_one_line(some_videos, tmp_path):
    empty, listed = tmp_path / "empty", tmp_path / "list.txt"
    empty.mkdir()
    listed.write_text("gone.mp4\nlost.mp4\n")
    out = tmp_path / "out"
    (tmp_path / "file").touch()
    cases = [(["--data", "nowhere"], "no such folder"), (["--data", str(empty)], "no video in this folder"),
             (["--data", str(listed)], "gone.mp4|lost.mp4"), (["--frames", "5"], "frames 5.*2"), (["--size", "20"], "height 20.*8"),
             (["--mask-ratio", "0"], "mask ratio 0"), (["--mask-ratio", "1"], "mask ratio 1"),
             (["--out", str(tmp_path / "file")], "cannot be written"), (["--strategy", "tubes"], "invalid choice"),
             (["--patch", "2x8"], "three sizes"), (["--size", "big"], "not a size"), (["--steps", "-1"], "whole number"),
             (["--lr", "nan"], "not a number"), (["--init", "gone.pt"], "gone.pt"), (["--reconstruct", "x.mp4"], "needs a trained model"),
             (["--amp", "fp16"], "needs a GPU"), (["--colour", "red"], "unrecognized"),
             (["--epoch", "3"], "unrecognized"), (["--model", "giant"], "invalid choice")]
    for change, words in cases:
        with pytest.raises(train.InputError) as caught:
            train.main(arguments(some_videos, out, "--steps", "2", "--workers", "0") + change)
        assert "\n" not in str(caught.value)
        assert re.search(words, str(caught.value)), f"{change}: {caught.value}"
    result = run_script("train.py", *arguments("nowhere", out), check=1)
    assert result.stderr.strip().splitlines()[-1].startswith("error: nowhere: no such") and "Traceback" not in result.stderr


def test_a_run_with_other_arguments_is_not_continued(some_videos, tmp_path):
    train.main(arguments(some_videos, tmp_path, "--steps", "2"))
    changes = (["--seed", "1"], "seed 0 -> 1"), (["--steps", "3"], "steps 2 -> 3"), (["--accum", "2"], "videos_per_step 2 -> 4")
    for change, words in changes:
        with pytest.raises(train.InputError, match=words):
            train.main(arguments(some_videos, tmp_path, "--steps", "2", *change))


def test_check_data_names_the_bad_files(some_videos, tmp_path, capsys):
    names = bad_files(tmp_path)
    assert train.main(["--check-data", "--data", str(tmp_path), "--workers", "2", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    for name in set(names) - {"folder.mp4", "missing.mp4"}:
        assert f"{name}: " in out
    assert "good.mp4:" not in out
    assert train.main(["--check-data", "--data", str(some_videos), "--workers", "0", "--device", "cpu"]) == 0
    (tmp_path / "odd").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "odd") + b"/\xff.mp4")).write_bytes(b"nothing")  # a name that is no text
    said = run_script("train.py", "--check-data", "--data", tmp_path / "odd", "--device", "cpu", check=1).stdout
    assert "\\udcff.mp4: InvalidDataError" in said


# ------------------------------------------------------------------------------- what happens to long runs


def test_a_damaged_checkpoint_is_told_and_never_loaded(some_videos, tmp_path, capsys):
    run = tmp_path / "run"
    train.main(arguments(some_videos, run, "--steps", "4"))
    data, rng = (run / "last.pt").read_bytes(), np.random.default_rng(0)
    reference = tensors(run / "last.pt")
    damages = [(kind, int(at)) for kind, few in (("cut", 10), ("flip", 20)) for at in rng.integers(len(data), size=100 if LONG else few)]
    silent = 0
    for kind, at in damages:
        rest = b"" if kind == "cut" else bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1:]
        (tmp_path / "last.pt").write_bytes(data[:at] + rest)
        try:
            loaded = tensors(tmp_path / "last.pt")
            silent += 1  # then the byte was padding, and everything that counts is what was written
            assert kind == "flip" and all(torch.equal(loaded[key], reference[key]) for key in reference)
        except (train.Damaged, train.InputError) as problem:
            assert "\n" not in str(problem)
    assert silent < len(damages) / 4
    (run / "last.pt").write_bytes(data[:len(data) // 2])
    capsys.readouterr()
    assert train.main(arguments(some_videos, run, "--steps", "4")) == 0
    out = capsys.readouterr().out
    assert "last.pt is cut off" in out and "going on from" in out and "last-1.pt after step 2" in out
    for path in run.glob("last*.pt"):
        path.write_bytes(b"")
    with pytest.raises(train.InputError, match="every checkpoint"):
        train.main(arguments(some_videos, run, "--steps", "4"))


def test_running_out_of_gpu_memory_is_one_line_that_says_what_to_change(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")
    with pytest.raises(SystemExit) as ended:
        train.run_script(main)
    words = r"error: out of GPU memory \(.*2.00 GiB.\); in training lower --batch-size .*\n"
    assert ended.value.code == 1 and re.fullmatch(words, capsys.readouterr().err)


def test_two_runs_cannot_share_a_folder_and_workers_do_not_hold_it(some_videos, tmp_path, monkeypatch):
    held = train.hold_folder(tmp_path)
    # Has the file open, like a data worker.
    worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[held.fileno()])
    result = run_script("train.py", *arguments(some_videos, tmp_path, "--steps", "1"), check=1)
    assert "in use by another run" in result.stderr.splitlines()[-1]
    held.close()

    def without_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    with monkeypatch.context() as patch, pytest.raises(train.InputError, match="cannot be locked.*No locks available; choose"):
        patch.setattr(train.fcntl, "lockf", without_locks)
        train.hold_folder(tmp_path)
    run_script("train.py", *arguments(some_videos, tmp_path, "--steps", "1"))
    worker.communicate(b"\n")


def test_arguments_that_are_given_win_over_the_demo_and_the_checkpoint(some_videos, tmp_path, capsys):
    demo, given = train.parse_arguments([]), train.parse_arguments(["--epochs", "200"])
    assert demo.steps == train.DEMO["steps"] and given.steps is None and given.epochs == 200 and given.model == "tiny"
    assert finetune.parse_arguments([]).steps == finetune.DEMO["steps"] and finetune.parse_arguments(["--epochs=5"]).steps is None
    for script, words in ((train, ["passes over the list.*default: 200", "everything random.*default: 0"]),
                          (finetune, ["large: epochs 50, repeat 2, layer_decay 0.75"])):
        # With data the demo's defaults are out of play.
        flags = vars(script.parse_arguments(["--data", "videos", *train.in_flags(script.DEMO).split()]))
        assert {key: flags[key] for key in script.DEMO} == script.DEMO, "the flags that --help names are not the demo's"
        with pytest.raises(SystemExit):
            script.parse_arguments(["--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert all(re.search(word, printed) for word in words)
    train.main(arguments(some_videos, tmp_path / "run", "--steps", "2", "--strategy", "frame", "--mask-ratio", "0.5"))
    for more, words in (([], "50% hidden (frame)"), (["--mask-ratio", "0.75", "--strategy", "tube"], "75% hidden (tube)")):
        train.main(["--reconstruct", str(some_videos / "0.mp4"), "--init", str(tmp_path / "run/last.pt"), "--out", str(tmp_path / "show"),
                    "--device", "cpu", *more])
        assert words in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "show").iterdir()) == ["reconstruction.mp4", "reconstruction.png"]
    for ratio in ("0", "1", "nan"):
        with pytest.raises(train.InputError, match=f"mask ratio {float(ratio)}"):
            train.main(["--reconstruct", str(some_videos / "0.mp4"), "--init", str(tmp_path / "run/last.pt"), "--out",
                        str(tmp_path / "show"), "--mask-ratio", ratio])


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    for content in ([1, 2], torch.zeros(3)):
        torch.save(content, tmp_path / "last.pt")
        with pytest.raises(train.InputError, match="no checkpoint"):
            train.load_init(tmp_path / "last.pt")
    for pickled in (b"", b"not a pickle", b"\x80\x02K", b"\x80\x02}q\x00(X\x05", b"\x80\x02h\x05."):
        with zipfile.ZipFile(tmp_path / "last.pt", "w") as archive:
            for name, content in (("data.pkl", pickled), ("version", b"3"), ("byteorder", b"little")):
                archive.writestr(f"last/{name}", content)
        with pytest.raises(train.InputError, match="is no checkpoint|is refused"):
            train.load_init(tmp_path / "last.pt")
    np.savez(tmp_path / "features.npz", np.zeros(3))
    with pytest.raises(train.InputError, match="features.npz is no checkpoint"):
        train.load_init(tmp_path / "features.npz")
    torch.save(dict(model=dict(wte=torch.zeros(3)), model_args=dict(n_layer=12)), tmp_path / "last.pt")  # of another project
    with pytest.raises(train.InputError, match="patch_embed.proj.weight has shape"):
        train.load_init(tmp_path / "last.pt")


class Mischief:
    def __reduce__(self):
        return os.mkdir, ("mischief",)


def test_a_checkpoint_that_carries_code_is_refused_and_the_code_does_not_run(some_videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model={}, extra=Mischief()), tmp_path / "last.pt")
    for call in (lambda: train.read_checkpoint(tmp_path / "last.pt"), lambda: train.main(arguments(some_videos, tmp_path, "--steps", "2")),
                 lambda: train.main(arguments(some_videos, tmp_path / "new", "--steps", "2", "--init", str(tmp_path / "last.pt")))):
        with pytest.raises(train.InputError, match="refused"):
            call()
    assert not (tmp_path / "mischief").exists()


def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(some_videos, tmp_path):
    """A limit on the size of files stands for the full disk; the checkpoint before was written without it."""
    assert train.main(arguments(some_videos, tmp_path, "--steps", "2")) == 0
    good = (tmp_path / "last.pt").read_bytes()
    script = ("import resource, signal, sys, torch, train; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              f"content = train.read_checkpoint({str(tmp_path / 'last.pt')!r})\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
              f"train.run_script(lambda: train.save_checkpoint(train.Path({str(tmp_path)!r}), content, 2))")
    result = run_script("-c", script, check=1)
    assert result.stderr.startswith("error: no checkpoint could be written") and "Traceback" not in result.stderr
    assert (tmp_path / "last.pt").read_bytes() == good and not list(tmp_path.glob("*.unfinished"))


def test_a_data_worker_that_dies_while_a_checkpoint_is_written_is_not_taken_for_a_full_disk(some_videos, tmp_path, monkeypatch):
    def torchs_handler(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")
    assert train.main(arguments(some_videos, tmp_path, "--steps", "4")) == 0
    monkeypatch.setattr(torch, "save", torchs_handler)
    (tmp_path / "last.pt").unlink()  # back to step 2
    with pytest.raises(train.InputError, match="the data workers gave no batch: DataLoader worker .* is killed"):
        train.main(arguments(some_videos, tmp_path, "--steps", "4"))
    assert sorted(path.name for path in tmp_path.glob("last*")) == ["last-1.pt"]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(some_videos, tmp_path, monkeypatch):
    forward = MaskedAutoencoder.forward
    calls = iter(range(100))
    monkeypatch.setattr(MaskedAutoencoder, "forward", lambda *args: forward(*args) * (math.nan if next(calls) == 2 else 1))
    with pytest.raises(train.InputError, match="step 3 are not finite"):
        train.main(arguments(some_videos, tmp_path, "--steps", "6"))
    assert train.read_checkpoint(tmp_path / "last.pt")["step"] == 2
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    clips = make_clips(some_videos, seed=0)
    assert row["step"] == 3 and row["loss"] is None and row["samples"] == [4, 5]
    assert row["videos"] == sorted(clips.videos[clips.video_of(k)] for k in (4, 5))


def test_a_signal_finishes_the_step_saves_and_the_same_command_goes_on(some_videos, tmp_path):
    """Also where Python's own way to start data workers is another one, as it is from 3.14 on."""
    flags = arguments(some_videos, tmp_path / "stopped", "--steps", "150", "--workers", "1", "--save-every", "1000")
    as_in_314 = ("import multiprocessing, train; multiprocessing.set_start_method('forkserver', force=True); "
                 f"train.sys.exit(train.main({flags}))")
    log, steps = tmp_path / "stopped" / "log.jsonl", [0]
    for number, command in ((signal.SIGTERM, ["-c", as_in_314]), (signal.SIGINT, ["train.py", *flags])):
        process = subprocess.Popen([sys.executable, *command], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   start_new_session=True)
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= steps[-1] + 3):
            os.sched_yield()
        os.killpg(process.pid, number)  # to the data workers as well, as a terminal or a cluster does
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err
        assert f"stopped by {number.name} after step" in out and "Traceback" not in err
        steps.append(train.read_checkpoint(tmp_path / "stopped" / "last.pt")["step"])
    assert 0 < steps[1] < steps[2] < 150
    for out in ("stopped", "whole"):
        assert train.main(arguments(some_videos, tmp_path / out, "--steps", "150", "--save-every", "1000")) == 0
    assert_same_run(tmp_path / "whole" / "last.pt", tmp_path / "stopped" / "last.pt")


def test_after_the_last_step_a_signal_ends_the_run_at_once(some_videos, tmp_path):
    """Also while Python is inside C code, here reading from a pipe into which nobody writes."""
    script = ("import os, signal, train\n"
              "train.Pretraining.conclude = lambda self: os.kill(os.getpid(), signal.%s) or os.read(os.pipe()[0], 1)\ntrain.main(%r)")
    for name in ("SIGTERM", "SIGINT"):
        said = run_script("-c", script % (name, arguments(some_videos, tmp_path / name, "--steps", "1")), check=128 + getattr(signal, name))
        assert f"stopped by {name}; the steps are done and saved" in said.stderr and "length: 1 steps" in said.stdout
        assert tensors(tmp_path / name / "last.pt")


def kill_until_done(command, seconds, rng, kills):
    """Run a command, SIGKILL it at a random moment, run it again, and so on; returns how often it was killed."""
    killed = 0
    while True:
        process = subprocess.Popen([sys.executable, *command], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        try:
            assert process.wait(rng.uniform(*seconds) if killed < kills else 120) == 0
            return killed
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1


def test_a_run_that_is_killed_again_and_again_ends_with_the_very_bytes_of_one_that_was_not(some_videos, tmp_path):
    rng, total, runs = pyrandom.Random(0), 0, 20 if LONG else 1
    assert train.main(arguments(some_videos, tmp_path / "whole", "--steps", "60", "--save-every", "60")) == 0
    for run in range(runs):
        out = tmp_path / f"run{run}"
        command = ["train.py", *arguments(some_videos, out, "--steps", "60", "--save-every", "1", "--workers", str(run % 3))]
        total += kill_until_done(command, (3, 6), rng, kills=5 if LONG else 1)
        assert_same_run(tmp_path / "whole" / "last.pt", out / "last.pt")
        assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == list(range(1, 61))
    print(f"{runs} runs, {total} kills")
    assert total > 0


def test_a_killed_rank_is_started_again_by_torchrun_and_the_result_is_the_same(some_videos, two_processes, tmp_path):
    """The second process kills itself once, in the middle; torchrun --max-restarts brings both back."""
    script = tmp_path / "dies_once.py"
    script.write_text(f"""import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import train
check_step = train.Pretraining.check_step
def dying(self, step, *numbers):
    if step == 3 and self.machine.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return check_step(self, step, *numbers)
train.Pretraining.check_step = dying
train.run_script(train.main)
""")
    out = tmp_path / "killed"
    torchrun("--max-restarts=3", script, *arguments(some_videos, out, "--steps", "8", "--accum", "2"))
    assert_same_run(two_processes / "last.pt", out / "last.pt")


def test_an_error_on_one_rank_ends_all_and_stands_last_on_the_screen(some_videos, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(f"""import sys
sys.path.insert(0, {str(HERE)!r})
import train
report = train.Pretraining.report
def failing(self):
    report(self)
    if self.machine.rank == 1:
        raise ArithmeticError("the reason on rank 1")
train.Pretraining.report = failing
train.run_script(train.main)
""")
    result = torchrun(script, *arguments(some_videos, tmp_path / "out", "--steps", "50"), check=1, timeout=60)
    assert "the reason on rank 1" in result.stderr[result.stderr.index("Root Cause"):]


def test_a_data_worker_that_dies_before_the_first_batch_is_asked_for_ends_the_run_with_a_message(some_videos, tmp_path, monkeypatch):
    def dead(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
    for name in ("clip_batches", "Log"):  # the workers start in the first, and the second comes before any batch
        with monkeypatch.context() as patch, pytest.raises(train.InputError, match="gave no batch: .* Killed. Expected were .*mp4"):
            patch.setattr(train, name, dead)
            train.main(arguments(some_videos, tmp_path / name, "--steps", "2"))


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_data_worker_that_dies_or_hangs_ends_the_run_with_a_message(how, some_videos, tmp_path):
    script = tmp_path / "worker.py"
    action = "os.kill(os.getpid(), signal.SIGKILL)" if how == "dies" else "signal.pause()"
    script.write_text(f"""import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import train
read = train.read_clips
main = os.getpid()
def odd(path, clips, size):
    if path.endswith("3.mp4") and os.getpid() != main:
        {action}
    return read(path, clips, size)
train.read_clips = odd
train.run_script(train.main)
""")
    result = run_script(script, *arguments(some_videos, tmp_path / "out", "--steps", "20", "--workers", "2", "--data-timeout", "5"),
                        check=1, timeout=60)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the data workers gave no batch") and ".mp4" in last
    assert how == "dies" or "3.mp4" in last  # the death of a worker can show while another's batch is awaited


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_default_run_is_compiled_and_learns(some_videos, tmp_path):
    command = [word if word != "cpu" else "cuda" for word in arguments(some_videos, tmp_path, "--steps", "30")]
    assert train.main(command) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 30 and np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_resumed_run_is_the_same_run(some_videos, tmp_path):
    def gpu(out, *more):
        return [word if word != "cpu" else "cuda" for word in arguments(some_videos, out, "--steps", "4", "--no-compile", *more)]
    assert train.main(gpu(tmp_path / "whole")) == 0
    assert train.main(gpu(tmp_path / "parts")) == 0
    (tmp_path / "parts" / "last-1.pt").replace(tmp_path / "parts" / "last.pt")  # back to step 2
    assert train.main(gpu(tmp_path / "parts")) == 0
    assert_same_run(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt", tolerance=1e-5)


# ------------------------------------------------------------------------------------- released checkpoints


def released_blocks(weights, prefix, dim, depth, apart):
    """Random tensors of transformer blocks as the releases name them; q, k and v apart or in one."""
    for i in range(depth):
        shapes = {"norm1.weight": (dim,), "norm1.bias": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,),
                  "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,),
                  "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,), "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,)}
        for name, rows in [("q", dim), ("k", dim), ("v", dim)] if apart else [("qkv", 3 * dim)]:
            shapes |= {f"attn.{name}.weight": (rows, dim), f"attn.{name}.bias": (rows,)}
        weights |= {f"{prefix}{i}.{name}": torch.randn(shape) * 0.1 for name, shape in shapes.items()}


def released(code, apart=True, head=None, dim=128, decoder_dim=64):
    """A checkpoint in the layout of the paper's code ("paper") or of mae_st, for 4 x 32 x 32 pixels in patches of 2 x 16 x 16."""
    torch.manual_seed(0)
    shapes = {"cls_token": (1, 1, dim), "pos_embed_class": (1, 1, dim), "pos_embed_spatial": (1, 4, dim), "pos_embed_temporal": (1, 2, dim),
              "patch_embed.proj.weight": (dim, 3, 2, 16, 16), "patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,)}
    if head:
        name = "head.projection." if code == "paper" else "head."
        shapes |= {name + "weight": (head, dim), name + "bias": (head,)}
    else:
        shapes |= {"decoder_embed.weight": (decoder_dim, dim), "decoder_embed.bias": (decoder_dim,), "mask_token": (1, 1, decoder_dim)}
        shapes |= {"decoder_pos_embed": (1, 9, decoder_dim), "pred_head.transforms.0.4.weight": (decoder_dim,),
                   "pred_head.transforms.0.4.bias": (decoder_dim,),
                   "pred_head.projections.0.weight": (768, decoder_dim), "pred_head.projections.0.bias": (768,)} if code == "paper" else \
                  {"decoder_pos_embed_class": (1, 1, decoder_dim), "decoder_pos_embed_spatial": (1, 4, decoder_dim),
                   "decoder_pos_embed_temporal": (1, 2, decoder_dim),
                   "decoder_cls_token": (1, 1, decoder_dim), "decoder_norm.weight": (decoder_dim,), "decoder_norm.bias": (decoder_dim,),
                   "decoder_pred.weight": (768, decoder_dim), "decoder_pred.bias": (768,)}
    weights = {name: torch.randn(shape) * (0.02 if "patch" in name else 0.2) for name, shape in shapes.items()}
    released_blocks(weights, "blocks.", dim, 2, apart)
    if not head:
        released_blocks(weights, "pred_head.transforms.0." if code == "paper" else "decoder_blocks.", decoder_dim, 4, apart)
    if code == "paper":
        return dict(model_state=weights, cfg="text", epoch=1)
    return dict(model=weights, args=argparse.Namespace(lr=1e-3), epoch=1)


def plain_released_blocks(weights, prefix, depth, x, heads):
    """The blocks of a released checkpoint on one clip's tokens (N, D), from its tensors alone."""
    for i in range(depth):
        w = {name[len(f"{prefix}{i}."):]: tensor for name, tensor in weights.items() if name.startswith(f"{prefix}{i}.")}
        fused = {kind: w[f"attn.qkv.{kind}"] if f"attn.qkv.{kind}" in w else torch.cat([w[f"attn.{part}.{kind}"] for part in "qkv"])
                 for kind in ("weight", "bias")}
        pair = lambda name: types.SimpleNamespace(weight=w[f"{name}.weight"], bias=w[f"{name}.bias"])
        attention = types.SimpleNamespace(heads=heads, qkv=types.SimpleNamespace(**fused), proj=pair("attn.proj"))
        x = plain_block(types.SimpleNamespace(norm1=pair("norm1"), norm2=pair("norm2"), attn=attention,
                                              mlp=[pair("mlp.fc1"), None, pair("mlp.fc2")]), x)
    return x


def plain_released_encoder(weights, video, keep):
    """One clip (3, T, H, W), normalised -> the class token and the tokens in keep (1 + K, D), before the last norm."""
    x = F.conv3d(video[None], weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"],
                 stride=(2, 16, 16))[0].flatten(1).T  # (N, D)
    x = x + (weights["pos_embed_temporal"][0][:, None] + weights["pos_embed_spatial"][0]).flatten(0, 1)
    x = torch.cat([weights["cls_token"][0] + weights["pos_embed_class"][0], x[keep]])
    return plain_released_blocks(weights, "blocks.", 2, x, 2)


def norm(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)


@pytest.mark.parametrize("apart", [True, False])
def test_a_released_pretrained_checkpoint_reconstructs_as_computed_from_its_tensors(apart, some_videos, tmp_path):
    torch.save(released("paper", apart), tmp_path / "released.pyth")
    content, weights = train.load_init(tmp_path / "released.pyth"), released("paper", apart)["model_state"]
    model = train.build(content["model_args"])
    train.load_weights(model, content["model"], "released.pyth")
    video, noise = torch.randn(1, 3, 4, 32, 32), torch.rand(1, 2, 2, 2)
    keep, hide = split_tokens(noise, (2, 2, 2), 0.7)
    latent = norm(plain_released_encoder(weights, video[0], keep[0]), weights, "norm")
    latent = F.linear(latent, weights["decoder_embed.weight"], weights["decoder_embed.bias"])
    full = weights["mask_token"][0].repeat(9, 1)
    full[torch.cat([torch.zeros(1, dtype=torch.long), 1 + keep[0]])] = latent
    full = plain_released_blocks(weights, "pred_head.transforms.0.", 4, full + weights["decoder_pos_embed"][0], 1)
    expected = F.linear(norm(full, weights, "pred_head.transforms.0.4"), weights["pred_head.projections.0.weight"],
                        weights["pred_head.projections.0.bias"])[1 + hide[0]]
    patches = patchify(video, (2, 16, 16))
    with torch.no_grad():
        prediction = model.decode(model.encoder.norm(model.encoder(patches, keep)), keep, hide)[0]
    assert_close(prediction, expected, 1e-4, "prediction")
    assert train.main(["--reconstruct", str(some_videos / "0.mp4"), "--init", str(tmp_path / "released.pyth"), "--out",
                       str(tmp_path / "show"), "--device", "cpu"]) == 0
    assert (tmp_path / "show" / "reconstruction.png").exists()


@pytest.mark.parametrize("code", ["paper", "mae_st"])
@pytest.mark.parametrize("apart", [True, False])
def test_a_released_classifier_scores_as_computed_from_its_tensors(code, apart, tmp_path):
    torch.save(released(code, apart, head=5), tmp_path / "released.pyth")
    args = finetune.parse_arguments(["--eval", "--val", "x", "--init", str(tmp_path / "released.pyth")])
    content = train.load_init(args.init)
    machine = train.Machine(torch.device("cpu"), 0, 1, 1)
    finetune.fill_in(args, machine, content)
    model, classes = finetune.trained_classifier(args, machine, content)
    weights = next(value for value in released(code, apart, head=5).values() if isinstance(value, dict))
    video = torch.randn(1, 3, 4, 32, 32)
    pooled = norm(plain_released_encoder(weights, video[0], torch.arange(8))[1:].mean(0), weights, "norm")
    name = "head.projection" if code == "paper" else "head"
    expected = F.linear(pooled, weights[f"{name}.weight"], weights[f"{name}.bias"])
    assert_close(model(video)[0].detach(), expected, 1e-4, code)
    assert classes == ["0", "1", "2", "3", "4"]
    model = mae_st.Classifier(**content["model_args"])  # with nothing but mae_st.py
    model.load_state_dict(content["model"])
    assert_close(model.eval()(video)[0].detach(), expected, 1e-4, code)


def test_of_mae_sts_pretrained_checkpoint_the_encoder_is_taken_and_the_decoder_left_out(some_videos, tmp_path, capsys):
    torch.save(released("mae_st"), tmp_path / "released.pth")
    content, weights = train.load_init(tmp_path / "released.pth"), released("mae_st")["model"]
    model = mae_st.Classifier(**content["model_args"], classes=3)
    finetune.take_weights(model, content, "released.pth", True, print)
    out = capsys.readouterr().out
    assert "a new head; left out: decoder_blocks, decoder_cls_token, decoder_embed, decoder_norm" in out
    video = torch.randn(1, 3, 4, 32, 32)
    expected = norm(plain_released_encoder(weights, video[0], torch.arange(8))[1:].mean(0), weights, "norm")
    assert_close(model.pooled(video)[0].detach(), expected, 1e-4, "pooled")
    with pytest.raises(train.InputError, match="decoder"):
        train.main(["--reconstruct", str(some_videos / "0.mp4"), "--init", str(tmp_path / "released.pth"), "--out", str(tmp_path / "show"),
                    "--device", "cpu"])


@pytest.mark.parametrize("name", ["blocks.1.attn.proj.weight", "blocks.0.attn.k.bias", "blocks.1.mlp.fc2.bias", "norm.weight",
                                  "pos_embed_class", "patch_embed.proj.bias",
                                  "patch_embed.proj.weight", "pos_embed_temporal"])
@pytest.mark.parametrize("change", ["another name", "another shape", "one more"])
def test_a_tensor_that_is_not_as_expected_is_an_error_that_names_it(name, change, tmp_path):
    content = released("paper")
    weights = content["model_state"]
    if change == "another name":
        weights[name + "x"] = weights.pop(name)
    elif change == "another shape":
        weights[name] = torch.cat([weights[name]] * 2, dim=-1)
    else:
        weights["surprise." + name] = weights[name]
    torch.save(content, tmp_path / "released.pyth")
    with pytest.raises(train.InputError) as caught:
        loaded = train.load_init(tmp_path / "released.pyth")
        kept = {key: value for key, value in loaded["model_args"].items() if key in finetune.ENCODER}
        model = mae_st.Classifier(**kept | dict(frames=4, height=32, width=32), classes=3)
        finetune.take_weights(model, loaded, "released.pyth", True, print)
    names = name, mae_st.our_name(name), mae_st.our_name(name).replace(".k.", ".qkv.")
    assert any(name in str(caught.value) for name in names) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize("content, problem", [
    ({"model": 3}, "no tensors"), ({"model_state": {"epoch": 3}}, "no tensors"), ({"weights": {}}, "no tensors"),
    ({"model": {"patch_embed.proj.weight": torch.zeros(8, 1, 2, 16, 16)}}, r"\(8, 1, 2, 16, 16\), expected \(D, 3, u, p, p\)"),
    ({"model": {"patch_embed.proj.weight": torch.zeros(8, 3, 2, 16, 8)}}, r"\(8, 3, 2, 16, 8\), expected")])
def test_a_file_that_holds_no_weights_of_ours_or_of_the_codes_says_what_is_missing(content, problem):
    with pytest.raises(ValueError, match=problem):
        mae_st.from_released(content)


def test_positions_are_interpolated_linearly_in_time_and_bicubically_in_space():
    torch.manual_seed(0)
    table = dict(zip(("encoder.pos_time", "encoder.pos_space"), (torch.randn(4, 3), torch.randn(15, 3))))
    other = mae_st.interpolate_positions(table, (4, 3, 5), (6, 3, 5))
    at = (np.arange(6) + 0.5) * 4 / 6 - 0.5  # centres of the new slices, counted in old ones
    for d in range(3):
        assert_close(other["encoder.pos_time"][:, d], np.interp(at, np.arange(4), table["encoder.pos_time"][:, d]).astype(np.float32),
                     1e-6, "time")
    assert torch.equal(other["encoder.pos_space"], table["encoder.pos_space"])
    grid = table["encoder.pos_space"].view(3, 5, 3)
    other = mae_st.interpolate_positions(table, (4, 3, 5), (4, 6, 4))["encoder.pos_space"].view(6, 4, 3)

    def weight(x):  # the cubic kernel with a = -0.75
        x = abs(x)
        return 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    for i, j in np.ndindex(6, 4):
        y, x = (i + 0.5) * 3 / 6 - 0.5, (j + 0.5) * 5 / 4 - 0.5
        expected = sum(weight(y - a) * weight(x - b) * grid[min(max(a, 0), 2), min(max(b, 0), 4)]
                       for a in range(-2, 6) for b in range(-2, 8))
        assert_close(other[i, j], expected, 1e-5, f"place {i}, {j}")


# ---------------------------------------------------------------------------------- parts of the fine-tuning


def test_the_classifier_is_a_linear_layer_on_the_norm_of_the_mean_patch_token():
    torch.manual_seed(0)
    model = mae_st.Classifier(classes=7, dropout=0.5, **{key: value for key, value in SMALL.items() if "decoder" not in key}).eval()
    torch.nn.init.normal_(model.head.weight)
    video = torch.randint(0, 256, (2, 3, 4, 12, 20), dtype=torch.uint8)
    tokens = model.encoder(model.encoder.patches(video))
    for b in range(2):
        mean = tokens[b, 1:].mean(0)
        normed = F.layer_norm(mean, mean.shape, model.encoder.norm.weight, model.encoder.norm.bias, 1e-6)
        expected = model.head.weight @ normed + model.head.bias
        assert_close(model(video)[b].detach(), expected.detach(), 1e-5, "scores")
    probe = mae_st.Classifier(classes=7, batch_norm=True, **{key: value for key, value in SMALL.items() if "decoder" not in key})
    probe.load_state_dict(model.state_dict(), strict=False)
    pooled = probe.pooled(video)
    expected = F.linear((pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-6).sqrt(), probe.head.weight, probe.head.bias)
    assert_close(probe(video).detach(), expected.detach(), 1e-4, "probe")


def test_learning_rates_fall_from_the_head_to_the_patches():
    model = mae_st.Classifier(classes=7, **{key: value for key, value in SMALL.items() if "decoder" not in key})
    groups = finetune.layer_groups(model, 0.05, 0.65)
    for name, parameter in model.named_parameters():
        (group,) = [group for group in groups if any(parameter is one for one in group["params"])]
        in_block = {"encoder.blocks.0": 1, "encoder.blocks.1": 2}.get(name[:16], 0)
        layer = 3 if name.startswith(("head", "encoder.norm")) else in_block
        assert group["scale"] == pytest.approx(0.65 ** (3 - layer)), name
        assert group["weight_decay"] == (0 if parameter.dim() == 1 else 0.05), name
    model.encoder.requires_grad_(False)
    assert sum(len(group["params"]) for group in finetune.layer_groups(model, 0.05, 0.65)) == 2


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.0, 0.0)])
def test_mixed_targets_are_in_the_proportion_of_what_is_seen(mixup, cutmix):
    shares = []
    for seed in range(200):
        colours = torch.tensor([-1.0, 0.5, 2.0])
        video = colours[:, None, None, None, None].expand(3, 3, 2, 10, 14).clone()
        targets = torch.eye(4)[:3]
        mixed, result = finetune.mix(video, targets, np.random.default_rng(seed), mixup, cutmix)
        partner = colours.flip(0)
        share = float((mixed[0, 0, 0].mean() - partner[0]) / (colours[0] - partner[0]))
        shares.append(share)
        for b in range(3):
            assert_close(mixed[b].mean(), share * colours[b] + (1 - share) * partner[b], 1e-4, "mean colour")
            assert_close(result[b], share * targets[b] + (1 - share) * targets[2 - b], 1e-4, "target")
            assert torch.equal(mixed[b], mixed[b, :1, :1].expand_as(mixed[b])), "frames and channels are mixed alike"
        if mixup == 0:
            assert mixed[0].unique().numel() <= 2
    if mixup or cutmix:
        assert 0.4 < np.mean(shares) < (0.6 if not cutmix else 0.75) and min(shares) < 0.1 and max(shares) > 0.9
    else:
        assert_close(np.array(shares), np.ones(200), 1e-5, "nothing is mixed")


def test_the_loss_of_fine_tuning_smooths_its_mixed_targets():
    scores = torch.randn(3, 4, dtype=torch.float64)
    mixed = torch.tensor([[1, 0, 0, 0], [0, 0.3, 0.7, 0], [0.5, 0, 0, 0.5]], dtype=torch.float64)
    smoothed = [[(0.9 * part + 0.1 / 4) for part in row] for row in mixed.tolist()]
    plain = -sum(part * math.log(math.exp(score) / sum(map(math.exp, row)))
                 for row, wanted in zip(scores.tolist(), smoothed) for score, part in zip(row, wanted)) / 3
    run = argparse.Namespace(args=argparse.Namespace(smoothing=0.1))
    assert_close(finetune.Finetuning.loss(run, lambda video: scores, None, mixed), plain, 1e-6, "loss")


def plain_operation(name, x, m):
    """An operation of RandAugment on one clip (3, T, H, W) of whole numbers 0..255, pixel by pixel."""
    C, T, H, W = x.shape
    level, out = abs(m), np.zeros(x.shape)
    grey = 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]
    factor = max(0.1, 1 + 0.9 * m)
    middle_x, middle_y = (W - 1) / 2, (H - 1) / 2
    angle = math.radians(30 * m)
    source = {"rotate": lambda i, j: (middle_x + math.cos(angle) * (j - middle_x) + math.sin(angle) * (i - middle_y),
                                      middle_y - math.sin(angle) * (j - middle_x) + math.cos(angle) * (i - middle_y)),
              "shear_x": lambda i, j: (j + 0.3 * m * (i + 0.5), i), "shear_y": lambda i, j: (j, i + 0.3 * m * (j + 0.5)),
              "translate_x": lambda i, j: (j + 0.45 * m * W, i), "translate_y": lambda i, j: (j, i + 0.45 * m * H)}.get(name)

    def pixel(c, t, i, j):
        return float(x[c, t, i, j]) if 0 <= i < H and 0 <= j < W else 115.0

    for c, t, i, j in np.ndindex(x.shape):
        v = float(x[c, t, i, j])
        if source:
            sx, sy = source(i, j)
            left, top = math.floor(sx), math.floor(sy)
            v = sum((1 - abs(sy - a)) * (1 - abs(sx - b)) * pixel(c, t, a, b) for a in (top, top + 1) for b in (left, left + 1))
        elif name == "auto_contrast":
            v = (v - x[c].min()) * 255 / (x[c].max() - x[c].min())
        elif name == "equalize":
            counts = np.bincount(x[c].flatten(), minlength=256)
            step = (counts.sum() - counts[np.nonzero(counts)[0][-1]]) // 255
            v = min(255, (step // 2 + counts[:int(v)].sum()) // step) if step else v
        elif name == "invert":
            v = 255 - v
        elif name == "posterize":
            v = int(v) & ~(2 ** (4 + int(4 * level)) - 1)
        elif name == "solarize":
            v = v if v < 256 - int(256 * level) else 255 - v
        elif name == "solarize_add":
            v = v + int(110 * level) if v < 128 else v
        elif name == "sharpness":
            if 0 < i < H - 1 and 0 < j < W - 1:
                smooth = (x[c, t, i - 1:i + 2, j - 1:j + 2].sum() + 4 * v) / 13
                v = smooth + factor * (v - smooth)
        else:
            base = {"colour": grey[t, i, j], "contrast": round(float(grey.mean())), "brightness": 0}[name]
            v = base + factor * (v - base)
        out[c, t, i, j] = min(max(v, 0), 255)
    return out


@pytest.mark.parametrize("name", finetune.OPERATIONS)
def test_each_operation_of_randaugment_equals_a_plain_loop_and_is_the_same_in_every_frame(name):
    rng = np.random.default_rng(0)
    for m in (0.7, -0.55):
        video = torch.from_numpy(rng.integers(20, 230, (3, 3, 2, 9, 12), dtype=np.uint8))
        video[1] = video[1, :, :1]  # a still clip stays still
        before = video.clone()
        finetune.rand_augment(video, [[(name, m), None], [None, (name, m)], [None, None]])
        for b in (0, 1):
            expected = plain_operation(name, before[b].numpy().astype(int), float(torch.tensor(m)))
            assert_close(video[b].double(), expected, 1, f"{name} {m}")  # of 255: to whole numbers, and what floor(110 m) of a float32 is
        assert torch.equal(video[1, :, 0], video[1, :, 1]) and torch.equal(video[2], before[2])


def test_in_a_batch_each_clip_gets_what_was_drawn_for_it():
    rng = np.random.default_rng(0)
    names = [*finetune.OPERATIONS, None]
    drawn = [[(names[i], rng.uniform(-1, 1)) if names[i] else None for i in rng.integers(len(names), size=2)] for _ in range(40)]
    video = torch.from_numpy(rng.integers(0, 256, (40, 3, 2, 9, 12), dtype=np.uint8))
    alone = [video[b:b + 1].clone() for b in range(40)]
    for clip, operations in zip(alone, drawn):
        finetune.rand_augment(clip, [operations])
    finetune.rand_augment(video, drawn)
    assert_close(video.double(), torch.cat(alone).double(), 1, "of 255, clips")


def test_randaugment_draws_every_operation_half_of_the_time_with_the_magnitude_asked_for():
    drawn = [operation for seed in range(3000) for operation in finetune.draw_operations(np.random.default_rng(seed), 7)]
    applied = [operation for operation in drawn if operation]
    assert abs(len(applied) / len(drawn) - 0.5) < 0.03
    counts = [sum(name == other for other, _ in applied) for name in finetune.OPERATIONS]
    assert len(counts) == 15 and min(counts) > 0.7 * len(applied) / 15
    m = np.array([m for _, m in applied])
    assert_close([abs(m).mean(), abs(m).std(), (m > 0).mean()], [0.7, 0.05, 0.5], 0.03, "mean, spread and sign of m")


def test_holes_are_noise_of_the_right_size_the_same_in_every_frame():
    holes = [finetune.draw_hole(np.random.default_rng(seed), 0.25, 40, 60) for seed in range(2000)]
    assert abs(sum(hole is not None for hole in holes) / 2000 - 0.25) < 0.04
    for top, bottom, left, right in filter(None, holes):
        assert 0 <= top < bottom <= 40 and 0 <= left < right <= 60 and 0.015 < (bottom - top) * (right - left) / 2400 < 0.36
    holes = [finetune.draw_hole(np.random.default_rng(seed), 1, 400, 600) for seed in range(2000)]
    top, bottom, left, right = np.array(holes).T
    h, w = bottom - top, right - left
    for numbers, low, high, margin in ((h * w / 240_000, 0.02, 1 / 3, 0.01), (np.log(h / w), math.log(0.3), -math.log(0.3), 0.1),
                                       (top, 0, 400, 100), (left, 0, 600, 150), (bottom, 0, 400, 100), (right, 0, 600, 150)):
        assert low - 0.02 <= numbers.min() and numbers.max() <= high + 0.02, (numbers.min(), numbers.max())
        assert numbers.max() > high - margin and numbers.min() < low + margin, (numbers.min(), numbers.max())
    video = torch.zeros(2, 3, 4, 40, 60)
    finetune.erase(video, [None, (10, 30, 20, 50)])
    assert (video[0] == 0).all() and ((video[1] != 0) == (video[1, :1, :1] != 0)).all() and (video[1] != 0).sum() == 3 * 4 * 20 * 30
    assert torch.equal(video[1], video[1, :, :1].expand_as(video[1])) and abs(video[1, :, 0, 10:30, 20:50].std() - 1) < 0.1


def test_views_lie_where_the_formula_says():
    for K, S in ((7, 3), (1, 1), (2, 1), (5, 2)):
        for i in range(K):
            # At 30 frames a second; 16 frames, stride 4: the last is 60 after the first.
            for frames, span in ((300, 60), (61, 60), (30, 60), (100, 60)):
                room = max(0, frames - 1 - span)
                start = i * math.floor(room / (K - 1)) if K > 1 else room // 2
                times = finetune.View(i, 0, (K, S), 16, 4, (224, 224), "clip").times(np.arange(frames) / 30)
                assert_close(times * 30, start + 4 * np.arange(16), 1e-9, f"clip {i} of {K} in {frames} frames")
        for j in range(S):
            for width, height, (H, W) in ((340, 256, (224, 224)), (256, 340, (224, 224)), (224, 224, (224, 224)), (320, 240, (96, 160))):
                (x, y, w, h), flip = finetune.View(0, j, (K, S), 16, 4, (H, W), "clip").box(width, height)
                assert not flip and max(w, h) == 1 and w * width / (h * height) == pytest.approx(W / H)
                place = j / (S - 1) if S > 1 else 0.5
                assert (x, y) == pytest.approx(((1 - w) * place, (1 - h) * place))


def test_segments_give_one_frame_of_each_equal_part():
    seconds = np.arange(40) / 8 + np.sin(np.arange(40)) / 20  # an uneven rate; five frames to each of eight parts
    drawn = [finetune.SegmentClip(np.random.default_rng(seed), 8, 4, (0.5, 1), False).times(seconds) for seed in range(200)]
    for i in range(8):
        assert {times[i] for times in drawn} == set(seconds[5 * i:5 * i + 5]), f"part {i}"
    for k in range(5):
        assert_close(finetune.View(k, 1, (5, 3), 8, 4, (16, 16), "segments").times(seconds), seconds[k::5], 1e-9, f"view {k} of 5")


def test_accuracy_counts_an_unreadable_video_as_wrong():
    scores = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [np.nan] * 3, [0.2, 0.5, 0.3]], np.float32)
    assert finetune.places(scores, [0, 1, 0, 2]).tolist()[:2] == [0, 2] and finetune.places(scores, [0, 1, 0, 2])[3] == 1
    assert finetune.accuracy(scores, [0, 1, 0, 2]) == dict(val_acc1=25.0, val_acc5=75.0, videos=4)


def test_labels_are_the_folders_names_or_the_lists_numbers_or_names():
    listed = lambda *labels: train.VideoList([f"{i}.mp4" for i in range(len(labels))], list(labels))
    assert finetune.find_classes(listed("cat", "a dog", "cat"), "list.txt") == ["a dog", "cat"]
    assert finetune.find_classes(listed("10", "2", "2"), "list.txt") == [str(i) for i in range(11)]
    assert finetune.label_numbers(listed("1", "00", "2"), ["0", "1", "2"], "list.txt") == [1, 0, 2]


def test_without_val_a_tenth_is_held_out_by_its_path_alone(tmp_path):
    def held_out(count):
        for i in range(count):
            (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
            (tmp_path / "ab"[i % 2] / f"{i}.mp4").touch()
        data = finetune.find_videos(types.SimpleNamespace(data=str(tmp_path), val=None, per_class=None, seed=0), lambda words: None)
        parts = [{videos[i] for i in range(len(videos))} for videos in (data.train, data.val)]
        assert len(parts[0]) + len(parts[1]) == count and not parts[0] & parts[1]
        return parts[1]
    few, many = held_out(100), held_out(300)
    assert few <= many and 15 < len(many) < 50


# -------------------------------------------------------------------------------------- fine-tuning, as run


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A folder with train/ and val/, three classes each, 15 and 7 videos, and a checkpoint of a short pre-training."""
    folder = tmp_path_factory.mktemp("labelled")
    for part, count in (("train", 5), ("val", 3)):
        for name in ("left", "right", "up"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count if (part, name) != ("val", "up") else 1):
                train.write_video(folder / part / name / f"{i}.mp4",
                                  train.moving_shapes(np.random.default_rng([i, count]), name, "red", 16, 32), 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)
        assert train.main(arguments(folder / "train", folder / "pretrain", "--steps", "4", "--save-every", "4")) == 0
    return folder


def tuning(folder, out, *more):
    return ["--data", str(folder / "train"), "--val", str(folder / "val"), "--init", str(folder / "pretrain" / "last.pt"), "--out",
            str(out), "--device", "cpu",
            "--batch-size", "2", "--views", "2x3", *map(str, more)]


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_fine_tuning_resumed_is_the_same_run_with_all_of_its_randomness_and_its_best_score(labelled, tmp_path, capsys):
    more = "--steps", 4, "--save-every", 2, "--drop-path", 0.2, "--lr", 0.5
    assert finetune.main(tuning(labelled, tmp_path / "whole", *more, "--workers", 1)) == 0
    assert finetune.main(tuning(labelled, tmp_path / "parts", *more, "--workers", 0)) == 0
    (tmp_path / "parts" / "last-1.pt").replace(tmp_path / "parts" / "last.pt")  # back to step 2
    (tmp_path / "parts" / "best.pt").unlink()
    assert train.read_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 2
    assert finetune.main(tuning(labelled, tmp_path / "parts", *more, "--workers", 0)) == 0
    assert "going on from" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")
    a, b = (train.read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert a["best"] == b["best"] and a["classes"] == ["left", "right", "up"]
    assert predictions(tmp_path / "whole") == predictions(tmp_path / "parts")
    assert finetune.main(tuning(labelled, tmp_path / "whole", *more)) == 0  # finished: says the same again, and adds nothing
    (tmp_path / "one").mkdir()
    (tmp_path / "whole" / "last.pt").rename(tmp_path / "one" / "last.pt")
    (tmp_path / "one" / "log.jsonl").write_text('{"step": 2, "ep')  # cut off by a crash
    assert finetune.main(tuning(labelled, tmp_path / "one", *more)) == 0
    lines = (tmp_path / "one" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["views"] == "2x3"
    (tmp_path / "one" / "log.jsonl").unlink()
    (tmp_path / "one" / "last.pt").rename(tmp_path / "whole" / "last.pt")
    rows = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "parts")]
    keep = lambda row: {key: row[key] for key in ("step", "loss", "lr", "grad_norm", "val_acc1", "val_acc5") if key in row}
    assert [keep(row) for row in rows[0]] == [keep(row) for row in rows[1]]
    assert [(row["step"], row["views"]) for row in rows[0] if "val_acc1" in row] == [(2, "1x1"), (4, "1x1"), (4, "2x3")]
    assert [row["step"] for row in rows[0] if "loss" in row] == [1, 2, 3, 4]
    with pytest.raises(train.InputError, match="mixup 0.8 -> 0.0"):
        finetune.main(tuning(labelled, tmp_path / "whole", *more, "--mixup", 0))
    peak, end, warm = 0.5 * 4 / 512, 1.6e-4 * 4 / 512, 4 * 5 / 75  # two clips of two videos; as for base, 5 of 75 epochs
    shares = [1 / (warm + 1), *((1 + math.cos(math.pi * (step - warm) / (4 - warm))) / 2 for step in (1, 2, 3))]
    assert_close([row["lr"] for row in rows[0] if "loss" in row], [end + (peak - end) * share for share in shares], 1e-6, "learning rates")


def test_fine_tuning_is_nothing_but_a_plain_loop_where_nothing_is_drawn(labelled, tmp_path):
    nothing = [word for name in "mixup cutmix drop-path dropout erase rand-augment".split() for word in (f"--{name}", "0")]
    assert finetune.main(tuning(labelled, tmp_path, *nothing, "--steps", 4, "--accum", 2, "--lr", 0.5, "--end-lr", 0.1, "--warmup", 0.5,
                                "--clip", 0.1, "--workers", 0)) == 0
    before = train.read_checkpoint(labelled / "pretrain" / "last.pt")["model"]
    torch.manual_seed(0)
    model = mae_st.Classifier(classes=3, dim=128, depth=2, heads=4, frames=4, height=16, width=16, patch=(2, 8, 8), positions="waves")
    model.encoder.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in before.items() if name.startswith("encoder.")})
    videos = train.list_videos(labelled / "train")
    clips = train.VideoClips(videos, seed=0, repeat=2, frames=4, stride=2, size=(16, 16), area=(0.08, 1))
    items = [[clips[4 * step + i] for i in range(4)] for step in range(4)]
    numbers = [torch.tensor([["left", "right", "up"].index(videos.labels[item["index"]]) for item in four for _ in range(2)])
               for four in items]
    batches = [(torch.cat([item["video"] for item in four]).permute(0, 4, 1, 2, 3), label) for four, label in zip(items, numbers)]
    rates = [8 / 512 * (0.1 + 0.4 * share) for share in (1 / 3, 2 / 3, 1, 0.5)]  # per 512 clips
    depth = {"encoder.blocks.0": 1, "encoder.blocks.1": 2, "encoder.norm.weight": 3, "encoder.norm.bias": 3, "head.weight": 3,
             "head.bias": 3}
    scale_of = lambda name: 0.65 ** (3 - next((at for beginning, at in depth.items() if name.startswith(beginning)), 0))
    loss_of = lambda video, label: -(model(video).log_softmax(1) * (F.one_hot(label, 3) * 0.9 + 0.1 / 3)).sum(1).mean()
    assert_run_is(tmp_path, model, plain_steps(model, loss_of, scale_of, rates, batches, (0.9, 0.999), 0.1))


def test_other_labels_or_other_weights_behind_the_same_names_are_another_run(labelled, tmp_path):
    videos, listed, init = train.list_videos(labelled / "train"), tmp_path / "list.csv", tmp_path / "init.pt"

    def run(labels, weights):
        listed.write_text("".join(f"{videos[i]},{label}\n" for i, label in enumerate(labels)))
        torch.save(weights, init)
        command = tuning(labelled, tmp_path / "run", "--steps", 3, "--save-every", 2, "--workers", 0)
        return finetune.main([{str(labelled / "train"): str(listed), str(labelled / "pretrain" / "last.pt"): str(init)}.get(word, word)
                              for word in command])

    labels, weights = videos.labels, train.read_checkpoint(labelled / "pretrain" / "last.pt")
    assert run(labels, weights) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["views"]) for row in rows if "views" in row] == [(2, "1x1"), (3, "1x1"), (3, "2x3")]  # the last step too
    with pytest.raises(train.InputError, match="arguments: labels [0-9]+ -> [0-9]+\\. Go on"):
        run([labels[-1], *labels[1:]], weights)
    weights["model"]["encoder.pos_time"] += 1
    with pytest.raises(train.InputError, match="arguments: init_weights [0-9]+ -> [0-9]+\\. Go on"):
        run(labels, weights)


def test_evaluation_is_the_same_on_one_and_two_processes(labelled, tmp_path, monkeypatch):
    """7 videos in groups of 2: the last group is short, and the second process gets one group less."""
    assert finetune.main(tuning(labelled, tmp_path / "run", "--steps", 2, "--lr", 0.5, "--workers", 0)) == 0
    command = ["finetune.py", "--eval", *tuning(labelled, tmp_path / "one")[2:], "--init", tmp_path / "run" / "last.pt", "--views", "8x2",
               "--workers", "0"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it
    one = run_script(*command)
    command[command.index(str(tmp_path / "one"))] = str(tmp_path / "two")
    two = torchrun(*command)
    assert predictions(tmp_path / "one") == predictions(tmp_path / "two")
    assert [row["video"] for row in predictions(tmp_path / "one")] == [train.list_videos(labelled / "val")[i] for i in range(7)]
    words = [re.search(r"top-1 .* of 7 videos", result.stdout).group() for result in (one, two)]
    assert words[0] == words[1]


def test_two_processes_fine_tune_as_one_does_where_nothing_is_drawn_per_process(labelled, tmp_path):
    more = "--steps", 3, "--mixup", 0, "--cutmix", 0, "--drop-path", 0, "--dropout", 0, "--erase", 0, "--lr", 0.5, "--workers", 0
    run_script("finetune.py", *tuning(labelled, tmp_path / "one", *more, "--batch-size", "4"))
    torchrun("finetune.py", *tuning(labelled, tmp_path / "two", *more))
    a, b = tensors(tmp_path / "one" / "last.pt"), tensors(tmp_path / "two" / "last.pt")
    for key in a:
        assert_close(a[key], b[key], 5e-4, key)


def test_the_probe_is_a_linear_model_on_the_exported_features(labelled, tmp_path):
    probe = tuning(labelled, tmp_path / "probe", "--probe", "--steps", 30, "--batch-size", 8, "--views", "1x1", "--save-every", 30)
    assert finetune.main(probe) == 0
    content = train.read_checkpoint(tmp_path / "probe" / "last.pt")
    before = train.read_checkpoint(labelled / "pretrain" / "last.pt")["model"]
    weights = content["model"]
    assert all(torch.equal(weights[name], before[name]) for name in weights if name.startswith("encoder."))
    assert finetune.main(["--features", str(tmp_path / "features"), *tuning(labelled, tmp_path / "none", "--views", "1x1")]) == 0
    assert not list(tmp_path.glob("*.unfinished"))
    stored = np.load(tmp_path / "features")
    val = stored["part"] == "val"
    assert val.sum() == 7 and (~val).sum() == 15 and list(stored["classes"]) == ["left", "right", "up"]
    for path, label in zip(stored["paths"], stored["labels"]):
        assert Path(path).parent.name == stored["classes"][label]
    x = (stored["features"][val] - weights["head_norm.running_mean"].numpy()) / np.sqrt(weights["head_norm.running_var"].numpy() + 1e-6)
    scores = x @ weights["head.weight"].numpy().T + weights["head.bias"].numpy()
    scores = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    for row, path, prediction in zip(scores, stored["paths"][val], predictions(tmp_path / "probe")):
        assert prediction["video"] == path
        assert_close([prediction["top5"][name] for name in ("left", "right", "up")], row, 1e-4, path)


def test_a_classifier_predicts_evaluates_and_is_trained_on_at_another_size(labelled, tmp_path, capsys):
    assert finetune.main(tuning(labelled, tmp_path / "run", "--steps", 2, "--size", "24x32", "--frames", 6, "--sampling", "segments",
                                "--no-flip", "--amp", "bf16")) == 0
    assert "positions interpolated from (2, 2, 2) to (3, 3, 4) patches, a new head; left out: decoder_blocks" in capsys.readouterr().out
    video = str(labelled / "val" / "up" / "0.mp4")
    assert finetune.main(["--predict", video, "--init", str(tmp_path / "run" / "last.pt"), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    shares = [float(line.split("%")[0]) for line in lines]
    assert {line.split()[-1] for line in lines} == {"left", "right", "up"}
    assert shares == sorted(shares, reverse=True) and abs(sum(shares) - 100) < 0.2
    assert finetune.main(tuning(labelled, tmp_path / "more", "--steps", 1)[:4]
                         + ["--init", str(tmp_path / "run" / "best.pt"), "--steps", "1", "--out", str(tmp_path / "more"),
                                                                                   "--device", "cpu", "--views", "1x1"]) == 0
    assert "a new head" not in capsys.readouterr().out
    assert finetune.main(["--scratch", *tuning(labelled, tmp_path / "scratch", "--steps", 1)]) == 0
    assert "from scratch" in capsys.readouterr().out


def test_wrong_input_of_fine_tuning_is_one_line(labelled, tmp_path):
    def listed(name, *lines):
        (tmp_path / name).write_text("\n".join(lines))
        return str(tmp_path / name)
    (tmp_path / "empty").mkdir()
    classes = listed("classes.txt", f"{labelled}/train/left/0.mp4 0", f"{labelled}/train/right/0.mp4 1")
    more = listed("more.txt", f"{labelled}/val/left/0.mp4 0", f"{labelled}/val/up/0.mp4 2")
    words = listed("words.txt", f"{labelled}/train/left/0.mp4 0", f"{labelled}/train/right/0.mp4 one")
    halves = listed("halves.txt", f"{labelled}/train/left/0.mp4 0.5", f"{labelled}/train/right/0.mp4 1")
    bare = listed("bare.txt", f"{labelled}/train/left/0.mp4")
    torch.save(dict(model={}), tmp_path / "strange.pt")
    torch.save(dict(weights=3), tmp_path / "stranger.pt")
    pretrain, nothing = str(labelled / "pretrain" / "last.pt"), str(tmp_path / "empty")
    cases = [(["--data", classes, "--val", more], "class '2' is not among the 2 classes"),
             (["--data", words], "'one' is not a whole number"),
             (["--data", halves], "'0.5' is not a whole number"), (["--data", bare], "no labels"), (["--val", bare], "no labels"),
             (["--val", nothing], "no video in this folder"),
             (["--views", "7"], "7x3"), (["--views", "ax3"], "7x3"), (["--views", "0x3"], "7x3"),
             (["--model", "base"], "--model base.*has tiny"),
             (["--patch", "2x4x4"], "patch"), (["--size", "20"], "height 20"), (["--init", str(tmp_path / "strange.pt")], "patch_embed"),
             (["--init", str(tmp_path / "stranger.pt")], "no tensors"), (["--init", "gone.pt"], "gone.pt"), (["--eval"], "has no head"),
             (["--predict", "x.mp4"], "has no head"),
             (["--features", "gone/f.npz"], "--features gone/f.npz cannot be written"),
             (["--features", nothing], "Is a directory"), (["--mixup", "-1"], "not a number"), (["--layer-decay", "2"], "not a number")]
    for change, pattern in cases:
        with pytest.raises(train.InputError) as caught:
            finetune.main(tuning(labelled, tmp_path / "out", "--steps", 2, "--workers", 0, *change))
        assert "\n" not in str(caught.value) and re.search(pattern, str(caught.value)), f"{change}: {caught.value}"
    for command, pattern in ((["--data", str(labelled / "train"), "--device", "cpu"], "no checkpoint"),
                             (["--data", str(labelled / "val"), "--init", pretrain, "--device", "cpu"], "give --val")):
        with pytest.raises(train.InputError, match=pattern):
            finetune.main(command)
    result = run_script("finetune.py", *tuning(labelled, tmp_path / "out", "--views", "many"), check=1)
    assert result.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in result.stderr


def test_unreadable_validation_videos_are_named_and_count_as_wrong(labelled, tmp_path, capsys):
    for part in ("train", "val"):
        shutil.copytree(labelled / part, tmp_path / part)
    (tmp_path / "val" / "left" / "0.mp4").write_bytes(b"nothing")
    assert finetune.main([word.replace(str(labelled / "val"), str(tmp_path / "val"))
                          for word in tuning(labelled, tmp_path / "run", "--steps", 1)]) == 0
    assert f"cannot be read: {tmp_path}/val/left/0.mp4" in capsys.readouterr().out
    assert predictions(tmp_path / "run")[0]["top5"] == {} and len(predictions(tmp_path / "run")) == 7


def test_fine_tuning_stops_when_not_finite_and_goes_on_after_a_signal(labelled, tmp_path, monkeypatch, capsys):
    more = "--steps", 6, "--save-every", 4, "--workers", 0
    assert finetune.main(tuning(labelled, tmp_path / "whole", *more)) == 0
    forward, calls = mae_st.Classifier.forward, iter(range(100))
    with monkeypatch.context() as patch, pytest.raises(train.InputError, match="step 3 are not finite"):
        patch.setattr(mae_st.Classifier, "forward", lambda self, video: forward(self, video) * (math.nan if next(calls) == 2 else 1))
        finetune.main(tuning(labelled, tmp_path / "broken", *more))
    check_step = finetune.Finetuning.check_step
    with monkeypatch.context() as patch:
        patch.setattr(finetune.Finetuning, "check_step", lambda self, step, *numbers: (step == 1 and os.kill(os.getpid(), signal.SIGTERM))
                      or check_step(self, step, *numbers))
        assert finetune.main(tuning(labelled, tmp_path / "parts", *more)) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in capsys.readouterr().out
    assert train.read_checkpoint(tmp_path / "parts" / "last.pt")["step"] in (2, 3, 4)
    assert finetune.main(tuning(labelled, tmp_path / "parts", *more)) == 0
    assert_same_run(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")
    assert train.read_checkpoint(tmp_path / "whole" / "last.pt")["best"] == train.read_checkpoint(tmp_path / "parts" / "last.pt")["best"]


# ---------------------------------------------------------------------------------------------------- bench.py

SPEED = "--model tiny --frames 4 --size 16 --patch 2x8x8 --batch-size 2 --rounds 1 --stride 2 --device cpu".split()


def test_the_arithmetic_gives_table_1_of_the_paper_within_a_percent():
    args = bench.parse_arguments("--flops --model large --ratios 0.9".split())
    dense, sparse = bench.arithmetic(bench.make_model(args, "meta"), args)
    assert abs(dense["gmacs_as_paper"] / 627.5 - 1) < 0.01 and abs(sparse["gmacs_as_paper"] / 81.0 - 1) < 0.01
    assert abs(sparse["gmacs"] / 79.5 - 1) < 0.01 and sparse["visible_tokens"] == 156 and dense["visible_tokens"] == 1568


@pytest.mark.parametrize("strategy, decode_ratio", [("agnostic", 1.0), ("tube", 1.0), ("frame", 1.0), ("agnostic", 0.5)])
def test_multiply_adds_are_those_that_torch_counts(strategy, decode_ratio):
    flags = f"--model tiny --frames 8 --size 24x40 --patch 2x8x8 --strategy {strategy} --decode-ratio {decode_ratio}"
    args = bench.parse_arguments(flags.split())
    model, video = bench.make_model(args, "cpu"), bench.random_video(2, args, "cpu")
    noise, extra = mask_noise(strategy, 2, model.encoder.grid), {} if decode_ratio == 1 else dict(decode_ratio=decode_ratio)
    for row in bench.arithmetic(model, args):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model.dense(video, row["mask_ratio"], noise) if row["dense"] else model(video, row["mask_ratio"], noise, **extra)
        counted = counter.get_total_flops() / 2 / 2 / 1e9  # two clips, and a multiply-add is two operations
        assert_close(row["gmacs"], counted, 1e-12, f"{row['name']}, {strategy}, {decode_ratio} decoded")


def test_the_dense_baseline_is_an_encoder_over_all_tokens_with_a_learned_one_for_the_hidden():
    torch.manual_seed(0)
    model = bench.WithDense(**SMALL).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    encoder, video, noise = model.encoder, torch.randn(2, 3, 4, 12, 20, dtype=torch.float64), mask_noise("agnostic", 2, (2, 3, 5))
    _, hide = split_tokens(noise, encoder.grid, 0.7)
    losses = []
    for b in range(2):  # tokens in their natural order, clip by clip
        hidden = torch.zeros(30, dtype=torch.bool).index_fill(0, hide[b], True)
        x = torch.where(hidden[:, None], model.encoder_mask_token, encoder.embed(patchify(video, (2, 4, 4))[b])) + encoder.positions()
        x = torch.cat([encoder.cls_token + encoder.pos_cls, x])
        for block in encoder.blocks:
            x = plain_block(block, x)
        x = model.decoder_embed(encoder.norm(x)) + model.decoder_pos
        for block in model.decoder_blocks:
            x = plain_block(block, x)
        target, _ = model.targets(patchify(video, (2, 4, 4))[b:b + 1], hidden.nonzero().T)
        losses.append(F.mse_loss(model.decoder_pred(model.decoder_norm(x[1:][hidden])), target[0]))
    loss, expected = model.dense(video, 0.7, noise), torch.stack(losses).mean()
    assert_close(loss.detach(), expected.detach(), 1e-10, "loss")


def test_running_out_of_memory_halves_the_batch_and_says_so(monkeypatch, capsys):
    args = bench.parse_arguments([*SPEED, "--repeat", "1", "--batch-size", "8"])
    run = bench.Run(args, train.start("cpu"))
    row = bench.Row(run, bench.arithmetic(run.model, args)[0])

    def step():
        if row.videos > allowed:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(row, "step", step)
    allowed = 3
    bench.fit(row)
    assert row.videos == 2 and capsys.readouterr().out.count("the batch is halved") == 2
    allowed = 0
    with pytest.raises(train.InputError, match="out of memory at one video"):
        bench.fit(row)


def test_the_straightforward_reading_gives_the_same_clips_and_is_timed_beside_ours(some_videos, tmp_path, capsys):
    for path in some_videos.iterdir():
        clips = [[train.RandomClip(np.random.default_rng(i), 4, 2) for i in range(8)] for _ in range(2)]
        ours = torch.from_numpy(train.read_clips(str(path), clips[0], (32, 32))).float()
        other = bench.read_straightforwardly(str(path), clips[1], (32, 32))
        ours, other = ours.mean(-1), other.mean(2)  # (R, T, H, W), brightness: colours are blurred differently
        same, different = (ours - other).abs().mean().item(), (ours - other.roll(1, dims=0)).abs().mean().item()
        assert 2 * same < different, f"mean difference {same:.2f}, between different clips {different:.2f}"
    assert bench.main([*SPEED, "--loader", str(some_videos), "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 7 and all(abs(row["ratio"] * row["straightforward_clips_per_s"] / row["clips_per_s"] - 1) < 1e-9 for row in rows)
    assert sum(line.startswith("|") for line in capsys.readouterr().out.splitlines()) == 2 + 7


def test_bench_prints_a_table_and_writes_its_rows_and_a_chart(some_videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "LEAST", 0)
    files = ["--json", str(tmp_path / "rows.json"), "--chart", str(tmp_path / "chart.svg")]
    assert bench.main([*SPEED, "--end-to-end", str(some_videos), "--workers", "1", "--ratios", "0.5", "0.75", *files]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    dense, *rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(table) == 2 + 3 and len({line.count("|") for line in table}) == 1
    assert dense["dense"] and [row["mask_ratio"] for row in rows] == [0.5, 0.75] and [row["visible_tokens"] for row in rows] == [4, 2]
    for row in [dense, *rows]:
        assert row["clips"] == 8 and abs(row["step_ms"] * row["clips_per_s"] / 8000 - 1) < 1e-9 and 0 <= row["data_wait"] <= 1
        assert abs(row["speedup"] * dense["clips_per_s"] / row["clips_per_s"] - 1) < 1e-9 and row["peak_mem_gb"] is None
        assert abs(row["load_compute_speedup"] * dense["load_compute_clips_per_s"] / row["load_compute_clips_per_s"] - 1) < 1e-9
        assert abs(row["measured_over_predicted"] * row["predicted_speedup"] / row["speedup"] - 1) < 1e-9
    drawn = ElementTree.parse(tmp_path / "chart.svg").iter("{http://www.w3.org/2000/svg}circle")
    assert len(list(drawn)) == 3 * 2  # predicted, compute, load + compute at two ratios


def test_the_chart_has_the_papers_speedups_as_rings_where_both_compute_the_same(tmp_path, capsys):
    def circles(model):
        assert bench.main(["--flops", "--model", model, "--json", str(tmp_path / "rows.json"), "--chart", str(tmp_path / "chart.svg")]) == 0
        return [[float(circle.get(key)) for key in ("cx", "cy")]
                for circle in ElementTree.parse(tmp_path / "chart.svg").iter("{http://www.w3.org/2000/svg}circle")]
    assert len(circles("base")) == 4  # the paper's Table 1 has ViT-L
    *dots, ring = circles("large")
    low, _, at_90, _ = [row["predicted_speedup"] for row in json.loads((tmp_path / "rows.json").read_text())[1:]]
    assert len(dots) == 4 and ring[0] == dots[2][0]
    assert abs((ring[1] - dots[2][1]) / (dots[0][1] - dots[2][1]) - (at_90 - 7.7) / (at_90 - low)) < 1e-3  # on the scale of ours


def test_the_profile_lists_what_a_step_spends_its_time_on(capsys):
    assert bench.main([*SPEED, "--profile", "0.75"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    shares = [float(row[2].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True) and 50 < sum(shares) < 101
    assert {row[4] for row in rows if row[0] in ("aten::mm", "aten::addmm")} == {"yes"} and any(row[4] == "" for row in rows)
    kernels = {"sm90_xmma_gemm_bf16": True, "nvjet_hsh_128x256": True, "triton_tem_fused_mm_0": True,
               "triton_poi_fused_flash_attention_add_3": False, "vectorized_add": False}
    assert {name: bool(bench.MATRIX.search(name)) for name in kernels} == kernels


def small_rows(*more):
    flags = "--model tiny --frames 4 --size 32 --patch 2x8x8 --ratios 0.75 --batch-size 3 --repeat 2 --rounds 3 --device cpu"
    args = bench.parse_arguments([*flags.split(), *more])
    run = bench.Run(args, bench.start("cpu"))
    return run, [bench.Row(run, line) for line in bench.arithmetic(run.model, args)]


def test_steps_of_the_benchmark_are_those_of_training():
    run, rows = small_rows("--decoder-width", "32", "--decoder-depth", "2")
    model = run.model
    assert len(model.decoder_blocks) == 2 and model.decoder_pos.shape[1] == 32
    for row, loss_of in zip(rows, (model.dense, model.forward)):
        begin = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        batches = [(bench.random_video(clips, run.args, run.device), mask_noise("agnostic", clips, (2, 4, 4))) for clips in (6, 1, 3)]
        loss = lambda video, noise: loss_of(video, row.line["mask_ratio"], noise)
        norms = [norm for _, norm in plain_steps(model, loss, lambda name: 1, [1e-4] * 3, batches, (0.9, 0.95), 0.02)]
        assert min(norms) > 0.02 and max(norms) > 1.1 * min(norms), "clipping makes no difference, so this proves nothing"
        expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        model.load_state_dict(begin)
        model.zero_grad()
        run.optimizer.state.clear()
        for batch in batches:
            run.step(row.loss_function, *batch)
        for name, parameter in model.named_parameters():
            assert_close(parameter.detach(), expected[name], 1e-6, name)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_the_tables_figures_follow_from_the_clock(some_videos, monkeypatch):
    """On a clock of its own: a dense step takes 0.2 s, a sparse one 0.05 s, a matrix product 0.01 s, a batch 0.1 s to come."""
    now, (run, rows) = [0.0], small_rows()
    seconds = dict(zip((row.loss_function for row in rows), (0.2, 0.05)))

    def pass_by(seconds, result=None):
        now[0] += seconds
        return result
    monkeypatch.setattr(bench, "mark", lambda device: now[0])
    monkeypatch.setattr(bench.Run, "step", lambda self, loss_function, video, noise: pass_by(seconds[loss_function]))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", lambda a, b: pass_by(0.01, a))
        product = bench.measure(run, rows)
    assert product == pytest.approx(2 * 2048**3 / 0.01 / 1e12)
    dense, sparse = bench.results(rows, product)
    for line, step in ((dense, 0.2), (sparse, 0.05)):
        wanted = dict(clips=6, step_ms=step * 1e3, step_ms_min=step * 1e3, step_ms_max=step * 1e3, clips_per_s=6 / step, speedup=0.2 / step,
                      measured_over_predicted=0.2 / step / line["predicted_speedup"], tflops=6 * line["gmacs"] * 6 / step / 1e3,
                      gmacs=line["gmacs_encoder"] + line["gmacs_decoder"])
        assert {key: line[key] for key in wanted} == pytest.approx(wanted)
        assert line["share_of_product"] == pytest.approx(line["tflops"] / product)
    batch = train.collate([make_clips(some_videos, frames=4, size=(32, 32), noise=("agnostic", (2, 4, 4)))[k] for k in range(3)])
    monkeypatch.setattr(bench, "loaded_batches", lambda videos, args, noise, size, steps, *_: (pass_by(0.1, batch) for _ in range(steps)))
    monkeypatch.setattr(bench, "LEAST", 1)
    for row, step in zip(rows, (0.2, 0.05)):
        assert bench.with_loading(row, train.list_videos(some_videos), 1) == pytest.approx((6 / (0.1 + step), 0.1 / (0.1 + step)))


# ----------------------------------------------------------------------------------------------- the README


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """A folder to run in, with so few generated videos that commands without --data take seconds."""
    train.generate_videos(tmp_path / "data" / "moving_shapes", per_class=2, held_out=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_miniature_runs_what_its_file_lacks_and_tells_what_failed(small_demo, monkeypatch, capsys):
    monkeypatch.setattr(bench, "FLAGS", {"mae": "", "tube": "--strategy tube"})
    monkeypatch.setattr(bench, "AT_ALL_LABELS", {"mae": "MAE"})
    monkeypatch.setattr(bench, "PER_CLASS", (3, 5))
    command = "--miniature lines.jsonl --seeds 1 --steps 1 --jobs 2 --device cpu".split()
    assert bench.main(command) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in Path("lines.jsonl").read_text().splitlines()]
    there = sorted((line["setting"], line["labels"] or 0) for line in lines)
    assert there == [("mae", 0), ("mae", 24), ("mae", 40), ("tube", 0), ("tube", 40)]
    for line in lines:
        out = Path(line["command"].split("--out ")[1])
        logged = [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]
        assert (out / "last.pt").exists() and [row["loss"] for row in logged if "loss" in row] == [line["loss"]]
        if line["labels"]:
            right = [row["label"] == next(iter(row["top5"]))
                     for row in map(json.loads, (out / "predictions.jsonl").read_text().splitlines())]
            assert line["videos"] == len(right) == 8 and line["top1"] == 100 * sum(right) / 8 and f" {line['top1']:.1f} |" in printed
    shutil.rmtree("runs")  # without its folder a pre-training is done again, for the fine-tuning that needs it
    kept = [line for line in lines if (line["setting"], line["labels"]) != ("tube", 40)]
    Path("lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert bench.main(command) == 0
    *before, last = [json.loads(line) for line in Path("lines.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line not in kept)
    assert before == kept and {key for key in last if last[key] != first[key]} <= {"seconds", "clips_per_s"}
    names = sorted(path.name for path in Path("runs").glob("miniature-*-1-steps/*"))
    assert names == ["tube-0", "tube-0-40", "tube-0-40.txt", "tube-0.txt"]
    assert capsys.readouterr().out == printed
    monkeypatch.setattr(bench, "FLAGS", {"mae": "", "ratio-2": "--mask-ratio 2"})
    with pytest.raises(train.InputError, match="--mask-ratio 2 .*\n.*status 1; runs/miniature-.*-1-steps/ratio-2-0.txt"):
        bench.main(command)
    assert "mask ratio 2.0 is out of range" in next(Path("runs").glob("miniature-*/ratio-2-0.txt")).read_text()
    Path("lines.jsonl").write_text("{")
    for file, problem in (("lines.jsonl", "no JSON"), ("no such folder/lines.jsonl", "cannot be written"), ("runs", "cannot be written")):
        with pytest.raises(train.InputError, match=problem):
            bench.main(["--miniature", file, *command[2:]])


def test_runs_of_the_miniature_with_other_settings_of_the_demos_are_other_runs(monkeypatch):
    args = bench.parse_arguments(["--miniature", "lines.jsonl", "--jobs", "2"])
    runs = [{bench.run_of(line) for part in bench.miniature_runs(args) for line in part}]
    for script, change in ((bench, dict(lr=1.0)), (finetune, dict(crop=0.3))):
        monkeypatch.setattr(script, "DEMO", script.DEMO | change)
        runs.append({bench.run_of(line) for part in bench.miniature_runs(args) for line in part})
    assert len(runs[0]) == len(runs[1]) == len(runs[2]) == 87 and not runs[0] & runs[1] and not runs[1] & runs[2]


def test_the_miniatures_table_has_the_mean_and_spread_over_the_seeds_and_the_ratio_of_the_median_rates():
    common = dict(machine="CPU", jobs=2)
    lines = [dict(setting="mae", labels=None, clips_per_s=rate, **common) for rate in (100, 300, 200)]
    lines += [dict(setting="tube", labels=None, clips_per_s=rate, **common) for rate in (500, 90, 300)]
    lines += [dict(setting="tube", labels=40, clips_per_s=1, top1=top1, **common) for top1 in (10.0, 20.0, 40.0)]
    lines += [dict(setting="mae", labels=40, clips_per_s=1, top1=99.0, **common)]
    row = bench.summary("tube", lines)
    assert row == dict(name="--strategy tube", labels_24="", labels_40=f"{70 / 3:.1f} ± {math.sqrt(700 / 3):.1f}", labels_80="",
                       speed="1.50x")
    assert bench.summary("tube", [*lines, dict(setting="mae", labels=None, clips_per_s=1, machine="another", jobs=2)])["speed"] == ""


def test_supervised_pretraining_in_the_miniature_has_the_demos_clips_and_recipe():
    given = vars(finetune.parse_arguments(bench.SUPERVISED.split()[1:]))
    for key in ("model", "frames", "stride", "size", "patch", "repeat"):
        assert given[key] == train.DEMO[key], key
    for key in finetune.DEMO.keys() - {"per_class", "steps", "save_every", "flip", "views"}:
        assert given[key] == finetune.DEMO[key], key
    assert given["steps"] * given["batch_size"] * given["repeat"] == train.DEMO["steps"] * train.DEMO["batch_size"] * train.DEMO["repeat"]
    for flags in (bench.FLAGS["repeat-1"], bench.FLAGS["repeat-2"]):  # as many clips a step, at the same real rate
        args = train.parse_arguments(flags.split())
        assert args.batch_size * args.repeat == train.DEMO["batch_size"] * train.DEMO["repeat"]
        assert args.lr * args.batch_size == train.DEMO["lr"] * train.DEMO["batch_size"]


def commands_of(text):
    """What stands in blocks of code without a language, and in backquotes, and begins with one of our scripts."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
    blocks = [line for language, block in fence.findall(text) if not language for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", fence.sub("", text))
    for command in [part.strip() for line in [*blocks, *spans] for part in line.split("&&")]:
        found = re.match(r"(?:python|torchrun(?: --\S+)*) (train|finetune|bench)\.py\b(.*)", command)
        if found:
            yield found[1], found[2].split()


def test_every_command_in_the_readme_is_one_that_its_script_takes():
    commands = list(commands_of((HERE / "README.md").read_text()))
    for script, flag in (("train", "large"), ("train", "--check-data"), ("bench", "--profile"), ("finetune", "my_videos"),
                         ("finetune", "--probe")):
        assert any(flag in given for name, given in commands if name == script), f"{script}.py ... {flag} was not found"
    for script, given in commands:
        {"train": train, "finetune": finetune, "bench": bench}[script].parse_arguments(given)
    own = next(vars(train.parse_arguments(given)) for name, given in commands if name == "train" and "--no-norm-pix" in given)
    assert {key: own[key] for key in train.DEMO} == train.DEMO, "for own videos the README gives other settings than the demo's"


def test_the_laptop_commands_of_the_readme_run(small_demo):
    section = re.search(r"\n## What you can check on a laptop\n(.*?)\n## ", (HERE / "README.md").read_text(), re.S)[1]
    commands = list(commands_of(section))
    assert {script for script, _ in commands} == {"train", "finetune", "bench"} and len(commands) >= 8
    (small_demo / "data" / "kinetics_like").symlink_to("moving_shapes/val")
    for script, given in commands:
        if script != "bench":
            assert {"train": train, "finetune": finetune}[script].main([*given, *"--steps 1 --workers 0 --device cpu".split()]) == 0
        elif "--miniature" not in given:  # which has a test of its own, above
            assert bench.main([*given, *"--model tiny --size 32 --frames 4 --batch-size 2 --rounds 1 --device cpu".split()]) == 0
