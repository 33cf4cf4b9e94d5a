"""The specification. Every test compares with a plain loop, a second route or an exact property, on
tiny models and videos that it makes itself. `pytest` takes minutes on two CPU cores;
`MAE_LONG=1 pytest` runs the large numbers: thousands of clips, hundreds of damaged files, dozens of
kills. From top to bottom: the model, videos, lists and batches, pre-training, what happens to long
runs, released checkpoints, fine-tuning, the benchmark, the README.
"""
import argparse
import ast
import contextlib
import errno
import itertools
import json
import math
import os
import random
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

import train  # before torch: it sets OMP_WAIT_POLICY

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
from mae_st import (STRATEGIES, MaskedAutoencoder, mask_noise, patchify, random_masking, unpatchify)

LONG = os.environ.get("MAE_LONG") == "1"
HERE = Path(__file__).parent
ENCODER = dict(frames=4, height=12, width=20, patch=(2, 4, 4), dim=24, depth=2, heads=3)
SMALL = ENCODER | dict(decoder_dim=16, decoder_depth=2, decoder_heads=2)
GRID = (2, 3, 5)  # of both
long_only = pytest.mark.skipif(not LONG, reason="MAE_LONG=1 runs it")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

def assert_close(a, b, tolerance, what=""):
    a, b = (torch.as_tensor(x).detach() for x in (a, b))
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    difference = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    assert difference <= tolerance, f"{what}: the largest difference is {difference:.3g}"

def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

def assert_refused(words, function, *args, kind=train.InputError):
    """It ends with this kind of error: one line, in which the words are found."""
    with pytest.raises(kind) as caught:
        function(*args)
    said = str(caught.value)
    assert "\n" not in said and re.search(words, said), f"{words!r} expected: {said}"

# --------------------------------------------------------------------------------------- the model

@pytest.mark.parametrize("size, patch, channels", [
    ((4, 6, 10), (2, 3, 5), 3), ((3, 4, 4), (1, 2, 4), 1), ((6, 5, 7), (3, 5, 1), 2)])
def test_patchify_equals_a_plain_loop_and_unpatchify_is_its_inverse(size, patch, channels):
    (T, H, W), (u, p, q) = size, patch
    video = torch.randint(0, 256, (2, channels, *size), dtype=torch.uint8)
    expected = [[video[b, :, t:t + u, y:y + p, x:x + q].permute(1, 2, 3, 0).flatten()
                 for t in range(0, T, u) for y in range(0, H, p) for x in range(0, W, q)]
                for b in range(2)]
    patches = patchify(video, patch)
    assert torch.equal(patches, torch.stack([torch.stack(row) for row in expected]))
    assert torch.equal(unpatchify(patches, patch, (T // u, H // p, W // q)), video)

def test_arguments_that_cannot_be_are_errors_that_name_what_is_wrong():
    cases = [(words, patchify, torch.zeros(1, 3, *shape), patch) for shape, patch, words in (
        ((16, 225, 224), (2, 16, 16), "height 225.*16"), ((0, 224, 224), (2, 16, 16), "frames 0"),
        ((16, 224, 224), (0, 16, 16), "frames 16.*patches of 0"))]
    cases += [("mask ratio", random_masking, torch.rand(1, 2, 2, 2), (2, 2, 2), ratio)
              for ratio in (0, 1, -0.5, 1.5, math.nan)]
    cases += [(re.escape(f"{shape} does not fit (B, 2, 2, 2)"), random_masking, torch.rand(shape),
               (2, 2, 2), 0.5)
              for shape in ((5, 2, 6), (5, 2, 2, 3), (5, 3, 1, 1), (5, 2, 2, 2, 1))]
    model, video = MaskedAutoencoder(**SMALL), torch.zeros(2, 3, 4, 12, 20)
    cases += [("hides nothing", random_masking, torch.rand(1, 1, 1, 1), (1, 2, 2), 0.5),
              ("'tubes' is unknown: choose agnostic, tube", mask_noise, "tubes", 1, (2, 2, 2)),
              ("noise for 3 clips", model, video, 0.5, torch.rand(3, *GRID)),
              ("int64", model, video.long()), ("decode ratio 0", model, video, 0.5, None, 0.0),
              (r"takes \(B, \*\(3, 4, 12, 20\)\)", model, video[..., :16])]
    for case in cases:
        assert_refused(*case, kind=ValueError)

@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("grid", [(8, 14, 14), (3, 5, 7), (4, 4, 4)])
def test_masks_partition_the_tokens_with_the_same_number_for_every_clip(strategy, grid):
    t, h, w = grid
    noise = mask_noise(strategy, 5, grid, torch.Generator().manual_seed(1))
    assert torch.equal(noise, mask_noise(strategy, 5, grid, torch.Generator().manual_seed(1)))
    ids_keep, ids_mask = random_masking(noise, grid, 0.75)
    for every, keep, hide in zip(noise.expand(5, *grid).flatten(1), ids_keep, ids_mask):
        assert sorted(keep.tolist() + hide.tolist()) == list(range(t * h * w))
        assert every[keep].max() <= every[hide].min(), "the smallest noise is kept"
    seen = torch.zeros(5, t * h * w, dtype=torch.bool).scatter(1, ids_keep, True).view(5, t, h, w)
    kept = {"tube": math.floor(h * w * 0.25) * t, "frame": max(1, math.floor(t * 0.25)) * h * w}
    assert ids_keep.shape[1] == kept.get(strategy, math.floor(t * h * w * 0.25))
    if strategy == "tube":
        assert (seen == seen[:, :1]).all()
    if strategy == "frame":
        assert (seen == seen[:, :, :1, :1]).all()
    if strategy == "block":  # all cubes are whole but the one where the number ran out
        a, b, c = (max(2, math.ceil(length / 4)) for length in grid)
        for clip in seen:
            cubes = [clip[i:i + a, j:j + b, k:k + c] for i in range(0, t, a)
                     for j in range(0, h, b) for k in range(0, w, c)]
            assert sum(bool(cube.any() and not cube.all()) for cube in cubes) <= 1

def test_agnostic_masks_choose_every_token_equally_often_and_count_in_whole_numbers():
    noise = mask_noise("agnostic", 4000, (2, 4, 4), torch.Generator().manual_seed(0))
    share = torch.bincount(random_masking(noise, (2, 4, 4), 0.75)[0].flatten(), minlength=32) / 4000
    assert_close(share, torch.full((32,), 0.25), 5 * math.sqrt(0.25 * 0.75 / 4000), "seen in")
    for tokens, ratio, kept in ((1568, 0.9, 156), (100, 0.9, 10), (1568, 0.75, 392),
                                (1568, 0.95, 78), (10, 0.99, 1)):
        ids_keep, _ = random_masking(torch.rand(1, 1, 1, tokens), (1, 1, tokens), ratio)
        assert ids_keep.shape[1] == kept

def linear_of(x, weights, name):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

def norm_of(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

def plain_blocks(x, weights, prefix, depth, heads):
    """Transformer blocks on one clip's tokens (N, D), written out. weights: tensors by their names;
    those of queries, keys and values are one tensor, or three as in released checkpoints."""
    d = x.shape[1] // heads
    for start in (f"{prefix}{i}." for i in range(depth)):
        y, out = norm_of(x, weights, start + "norm1"), []
        if start + "attn.qkv.weight" in weights:
            q, k, v = linear_of(y, weights, start + "attn.qkv").chunk(3, dim=1)
        else:
            q, k, v = (linear_of(y, weights, f"{start}attn.{part}") for part in "qkv")
        for i in range(0, x.shape[1], d):
            attention = torch.softmax(q[:, i:i + d] @ k[:, i:i + d].T / math.sqrt(d), dim=1)
            out.append(attention @ v[:, i:i + d])
        x = x + linear_of(torch.cat(out, dim=1), weights, start + "attn.proj")
        y = linear_of(norm_of(x, weights, start + "norm2"), weights, start + "mlp.fc1")
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + linear_of(y, weights, start + "mlp.fc2")
    return x

def plain_loss(model, video, hidden):
    """The paper's loss, token by token and clip by clip. hidden: bool (B, t, h, w)."""
    encoder, losses, w = model.encoder, [], dict(model.named_parameters())
    (u, p, q), (t, h, W) = encoder.patch, encoder.grid
    for b in range(len(video)):
        tokens, rows, targets = [encoder.cls_token[0] + encoder.pos_embed_class[0]], [0], {}
        for i, (ti, yi, xi) in enumerate(np.ndindex(t, h, W)):
            patch = video[b, :, ti * u:(ti + 1) * u, yi * p:(yi + 1) * p, xi * q:(xi + 1) * q]
            patch = patch.permute(1, 2, 3, 0)  # (u, p, q, C)
            if hidden[b, ti, yi, xi]:
                x = patch[0].flatten() if model.target == "frame" else patch.flatten()
                if model.norm_pix:
                    variance = ((x - x.mean())**2).sum() / (len(x) - 1)
                    x = (x - x.mean()) / torch.sqrt(variance + 1e-6)
                targets[i] = x
            else:
                place = encoder.pos_embed_temporal[ti] + encoder.pos_embed_spatial[yi * W + xi]
                tokens.append(linear_of(patch.flatten(), w, "encoder.patch_embed") + place)
                rows.append(1 + i)
        x = plain_blocks(torch.stack(tokens), w, "encoder.blocks.", 2, encoder.blocks[0].attn.heads)
        x = linear_of(norm_of(x, w, "encoder.norm"), w, "decoder_embed")
        full = [model.mask_token[0] + position for position in model.decoder_pos_embed]
        for row, token in zip(rows, x):  # in their natural order
            full[row] = token + model.decoder_pos_embed[row]
        y = plain_blocks(torch.stack(full), w, "decoder_blocks.", 2,
                         model.decoder_blocks[0].attn.heads)
        y = linear_of(norm_of(y, w, "decoder_norm"), w, "decoder_pred")
        losses += [((y[1 + i] - x)**2).mean() for i, x in targets.items()]
    return torch.stack(losses).mean()

def randomise(model):
    """Biases and norms too, so that each one matters."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model

def test_hidden_pixels_never_reach_the_encoder():
    model, noise = MaskedAutoencoder(**SMALL), torch.rand(1, *GRID)
    patches = torch.randint(0, 256, (1, 30, 96), dtype=torch.uint8)
    ids_keep, ids_mask = random_masking(noise, GRID, 0.9)
    other = patches.clone()
    other[0, ids_mask[0]] = 255 - other[0, ids_mask[0]]
    assert torch.equal(model.encoder(patches, ids_keep), model.encoder(other, ids_keep))
    other[0, ids_keep[0]] = 255 - other[0, ids_keep[0]]
    assert not torch.equal(model.encoder(patches, ids_keep), model.encoder(other, ids_keep))

@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("target, norm_pix", [("frame", True), ("patch", False)])
def test_loss_and_all_gradients_equal_a_plain_loop(strategy, target, norm_pix):
    torch.manual_seed(0)
    shape = SMALL | dict(frames=6, height=9, width=20, patch=(2, 3, 4))
    model = randomise(MaskedAutoencoder(**shape, target=target, norm_pix=norm_pix).double())
    video = torch.randn(2, 3, 6, 9, 20, dtype=torch.float64)
    noise = mask_noise(strategy, 2, model.encoder.grid)
    ids_keep, _ = random_masking(noise, model.encoder.grid, 0.6)
    hidden = torch.ones(2, 45, dtype=torch.bool).scatter(1, ids_keep, False).view(2, 3, 3, 5)
    loss, expected = model(video, 0.6, noise), plain_loss(model, video, hidden)
    assert_close(loss, expected, 1e-10, "loss")
    names, parameters = zip(*model.named_parameters())
    for name, a, b in zip(names, torch.autograd.grad(loss, parameters),
                          torch.autograd.grad(expected, parameters)):
        assert b.abs().max() > 0, f"{name} has no part in the loss"
        assert_close(a, b, 1e-9 * max(1, b.abs().max().item()), f"gradient of {name}")

def test_decoding_a_share_of_the_hidden_patches_decodes_those_of_the_smallest_noise():
    torch.manual_seed(0)
    model, noise = MaskedAutoencoder(**SMALL), torch.rand(2, *GRID)
    video = torch.randn(2, 3, 4, 12, 20)
    patches = patchify(video, (2, 4, 4))
    ids_keep, ids_mask = random_masking(noise, GRID, 0.8)
    latent = model.encoder.norm(model.encoder(patches, ids_keep))
    prediction = model.decode(latent, ids_keep, ids_mask[:, :12])
    target, _ = model.targets(patches, ids_mask[:, :12])
    assert_close(model(video, 0.8, noise, decode_ratio=0.5), F.mse_loss(prediction, target), 1e-6)
    assert torch.equal(model(video, 0.8, noise, decode_ratio=1.0), model(video, 0.8, noise))
    assert_refused("decode ratio 0", model, video, 0.8, noise, 0.0, kind=ValueError)

def test_bytes_and_normalised_floats_give_the_same_loss():
    model, noise = MaskedAutoencoder(**SMALL), torch.rand(2, *GRID)
    video = torch.randint(0, 256, (2, 3, 4, 12, 20), dtype=torch.uint8)
    other = (video.float() / 255 - 0.45) / 0.225
    assert_close(model(video, 0.8, noise), model(other, 0.8, noise), 1e-6, "loss")

@pytest.mark.parametrize("target, norm_pix", [("frame", True), ("patch", False)])
def test_reconstruct_keeps_what_was_seen_and_fills_in_the_predictions(target, norm_pix):
    model = MaskedAutoencoder(**SMALL, target=target, norm_pix=norm_pix)
    noise = torch.rand(2, *GRID)
    video = torch.randint(0, 256, (2, 3, 4, 12, 20), dtype=torch.uint8)
    filled, mask = model.reconstruct(video, 0.7, noise)
    step = 2 if target == "frame" else 1
    original = video[:, :, ::step].float() / 255
    hidden = mask.repeat_interleave(2 // step, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    hidden = hidden[:, None].expand_as(original)
    assert_close(filled[~hidden], original[~hidden], 1e-6, "seen pixels")
    assert mask.sum() == 2 * (30 - 9) and not torch.allclose(filled[hidden], original[hidden])
    difference = patchify((filled - original) / 0.225, model.target_patch)  # the loss, again
    if norm_pix:
        variance = patchify(original / 0.225, model.target_patch).var(-1, keepdim=True)
        difference = difference / (variance + 1e-6).sqrt()
    assert_close((difference**2).mean() / 0.7, model(video, 0.7, noise), 1e-4, "from the picture")

def test_positions_that_start_as_waves_are_sines_and_cosines_of_each_axis():
    model = MaskedAutoencoder(frames=6, height=4, width=10, patch=(2, 2, 2), dim=32, depth=1,
                              heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=1,
                              positions="waves")
    for table, dim in ((model.encoder.pos_embed(), 32), (model.decoder_pos_embed[1:], 16)):
        expected = torch.zeros(3, 2, 5, dim)
        for place in np.ndindex(3, 2, 5):
            at = 0
            for axis, length in enumerate((3, 2, 5)):
                pairs = dim // 8 if axis == 0 else 3 * dim // 16
                for i in range(pairs):
                    period = 2 * length ** (1 - i / (pairs - 1) if pairs > 1 else 1)
                    phase = 2 * math.pi * (place[axis] + 0.5) / period
                    expected[place][at + i] = math.sin(phase)
                    expected[place][at + pairs + i] = math.cos(phase)
                at += 2 * pairs
        assert_close(table.view(3, 2, 5, dim), expected, 1e-5, f"positions of width {dim}")
    for start, width in (("waves", 24), ("wave", 32)):
        with pytest.raises(ValueError, match=f"'{start}' of width {width}"):
            mae_st.Encoder(dim=width, heads=2, positions=start)

def test_features_are_the_encoder_over_all_tokens_with_the_class_token_apart():
    encoder, video = mae_st.Encoder(**ENCODER), torch.randn(2, 3, 4, 12, 20)
    tokens, cls = encoder.features(video)
    assert tokens.shape == (2, 30, 24) and cls.shape == (2, 24)
    order = torch.randperm(30).expand(2, 30)  # every token kept, in another order
    shuffled = encoder.norm(encoder(encoder.patchify(video), order))
    assert_close(shuffled[:, 1:], tokens[:, order[0]], 1e-5, "tokens")
    assert_close(shuffled[:, 0], cls, 1e-5, "class token")

def test_checkpointed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    plain, again = MaskedAutoencoder(**SMALL), MaskedAutoencoder(**SMALL, checkpointing=True)
    again.load_state_dict(plain.state_dict())
    video, noise, calls = torch.randn(2, 3, 4, 12, 20), torch.rand(2, *GRID), Counter()
    for model in (plain, again):
        model.encoder.blocks[0].register_forward_pre_hook(
            lambda block, inputs, model=model: calls.update([model]))
        model(video, 0.8, noise).backward()
        model.eval()(video, 0.8, noise).backward()
    assert calls[plain] == 2 and calls[again] == 3  # in training again for the backward pass
    for (name, a), b in zip(plain.named_parameters(), again.parameters()):
        assert_close(a.grad, b.grad, 1e-6, name)

def test_drop_path_skips_whole_clips_and_keeps_the_mean():
    x = torch.ones(4000, 2, 3)
    y = mae_st.drop_path(x, 0.25, training=True)
    kept = y[:, 0, 0] > 0
    assert_close(y[kept], x[kept] / 0.75, 1e-6, "kept clips")
    assert (y[~kept] == 0).all() and abs(kept.float().mean() - 0.75) < 0.04
    encoder = mae_st.Encoder(**ENCODER | dict(depth=5), drop_path=0.2)
    rates = [block.drop_path for block in encoder.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    patches = torch.randn(8, 30, 96)
    assert not torch.equal(encoder(patches), encoder(patches))  # in training
    assert torch.equal(encoder.eval()(patches), encoder(patches))

@pytest.mark.parametrize("size, millions, dim, depth, heads, decoder", [
    ("base", 86, 768, 12, 12, (512, 4, 8)), ("large", 304, 1024, 24, 16, (512, 4, 8)),
    ("huge", 632, 1280, 32, 16, (512, 4, 8)), ("small", 22, 384, 12, 6, (192, 4, 3)),
    ("tiny", 1, 128, 2, 4, (64, 1, 2)), ("the default", 304, 1024, 24, 16, (512, 4, 8))])
def test_sizes_have_the_papers_shapes(size, millions, dim, depth, heads, decoder):
    with torch.device("meta"):
        model = MaskedAutoencoder(**mae_st.SIZES.get(size, {}))
    for blocks, width, shape in ((model.encoder.blocks, dim, (dim, depth, heads)),
                                 (model.decoder_blocks, decoder[0], decoder)):
        assert (len(blocks[0].norm1.weight), len(blocks), blocks[0].attn.heads) == shape
        assert blocks[0].mlp.fc1.weight.shape == (4 * width, width)
    assert round(sum(p.numel() for p in model.encoder.parameters()) / 1e6) == millions
    assert model.decoder_pos_embed.shape == (1569, decoder[0])
    encoder, pixels = model.encoder, (*model.encoder.video_size, *model.encoder.patch)
    assert pixels == (16, 224, 224, 2, 16, 16) and model.target == "frame" and model.norm_pix
    assert not encoder.checkpointing and {block.drop_path for block in encoder.blocks} == {0}

def test_weights_start_as_xavier_with_bias_0_tokens_small_and_the_head_next_to_nothing():
    torch.manual_seed(0)
    shape = dict(frames=4, height=64, width=64, dim=96, depth=2, heads=2)
    model = MaskedAutoencoder(**shape, decoder_dim=64, decoder_depth=1, decoder_heads=2)
    classifier, linear = mae_st.Classifier(**shape, classes=50), 0
    for name, module in [*model.named_modules(), *classifier.encoder.named_modules()]:
        if isinstance(module, torch.nn.Linear):
            bound, linear = math.sqrt(6 / sum(module.weight.shape)), linear + 1
            assert 0.99 * bound < module.weight.abs().max() <= bound, name
            assert abs(module.weight.std() * math.sqrt(3) / bound - 1) < 0.03, name
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all(), name
        assert (getattr(module, "bias", None) is None) or (module.bias == 0).all(), name
    assert linear == 3 + 3 * 4 + 1 + 2 * 4  # two embeddings, one more, four a block
    for name, table in model.named_parameters():
        if "pos_embed" in name or "token" in name:
            assert 0.013 < table.std() < 0.027 and table.abs().max() < 0.1, f"{name}: {table.std()}"
    assert abs(classifier.head.weight.std() / 2e-5 - 1) < 0.05 and (classifier.head.bias == 0).all()

def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine():
    rates = [mae_st.learning_rate(step, 100, 2.0, 0.2) for step in range(101)]
    assert rates[:21] == pytest.approx(list(np.arange(21) / 10))
    assert rates[60] == pytest.approx(1.0) and rates[100] == pytest.approx(0)
    other = [mae_st.learning_rate(step, 100, 2.0, 0.2, 0.5, 0.4) for step in range(101)]
    assert other[:21] == pytest.approx([0.5 + 0.75 * rate for rate in rates[:21]])
    assert other[20:] == pytest.approx([0.4 + 0.8 * rate for rate in rates[20:]])

def test_weight_decay_spares_biases_and_norms_and_rates_fall_from_the_head_to_the_patches():
    model = mae_st.Classifier(classes=7, **ENCODER)
    for other, decay in ((MaskedAutoencoder(**SMALL), 1.0), (model, 0.65)):
        groups = mae_st.param_groups(other, 0.05, decay)
        for name, parameter in other.named_parameters():
            (group,) = [g for g in groups if any(parameter is one for one in g["params"])]
            in_block = {"encoder.blocks.0": 1, "encoder.blocks.1": 2}.get(name[:16], 0)
            top = name.startswith(("head", "encoder.norm", "decoder", "mask_token"))
            assert group["scale"] == pytest.approx(decay ** (0 if top else 3 - in_block)), name
            assert group["weight_decay"] == (0 if parameter.dim() == 1 else 0.05), name
    model.encoder.requires_grad_(False)
    assert sum(len(group["params"]) for group in mae_st.param_groups(model, 0.05, 0.65)) == 2

def test_the_model_file_imports_torch_alone():
    nodes = list(ast.walk(ast.parse((HERE / "mae_st.py").read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}

@needs_gpu
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 5e-3), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)])  # of the gradient
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_the_loss_equals_float64_on_the_cpu(dtype, tolerance, compiled):
    torch.manual_seed(0)
    model = MaskedAutoencoder(**SMALL | dict(dim=128, heads=2, decoder_dim=64, decoder_heads=1))
    video, noise = torch.randint(0, 256, (4, 3, 4, 12, 20), dtype=torch.uint8), torch.rand(4, *GRID)
    expected = model.double()((video.double() / 255 - 0.45) / 0.225, 0.8, noise)
    weight = model.encoder.blocks[0].mlp.fc1.weight
    gradient = torch.autograd.grad(expected, weight)[0]
    model = model.float().cuda()
    step = torch.compile(model) if compiled else model
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = step(video.cuda(), 0.8, noise.cuda())
    assert abs(loss.item() / expected.item() - 1) < (3e-3 if dtype == torch.bfloat16 else 1e-3)
    loss.backward()
    own = model.encoder.blocks[0].mlp.fc1.weight.grad.cpu().double()
    assert ((own - gradient).norm() / gradient.norm()).item() < tolerance

def test_another_loss_is_one_function_which_all_follow(monkeypatch):
    """L1 in place of the squared error: training, the dense baseline, predicting the mean."""
    torch.manual_seed(0)
    model, video = bench.WithDense(**SMALL, norm_pix=False), torch.randn(2, 3, 4, 12, 20)
    noise = torch.rand(2, *GRID)
    for parameter in (model.decoder_pred.weight, model.decoder_pred.bias):
        torch.nn.init.zeros_(parameter)  # all predictions are 0
    monkeypatch.setattr(MaskedAutoencoder, "loss", staticmethod(lambda a, b: (a - b).abs().mean()))
    target, _ = model.targets(patchify(video, (2, 4, 4)), random_masking(noise, GRID, 0.8)[1])
    for loss in (model(video, 0.8, noise), model.dense(video, 0.8, noise)):
        assert_close(loss, target.abs().mean(), 1e-6, "loss")
    assert_close(train.loss_of_the_mean(model, video, 0.8, noise),
                 (target - target.mean()).abs().mean(), 1e-6, "always predicting the mean")

# ------------------------------------------------------------------------------------------ videos

def natural_frames(count=40, height=96, width=128):
    """Frames with texture, motion and noise, uint8 (T, H, W, 3): encoders use every kind of
    picture."""
    rng, side = np.random.default_rng(0), max(height, width)
    frames = train.moving_scene(rng, "down_left", count, side)[:, :height, :width]
    for t, frame in enumerate(frames):
        frame[3 * t % height:3 * t % height + 8] = 255 * (t % 7) // 6
    return np.clip(frames + rng.normal(0, 4, frames.shape), 0, 255).astype(np.uint8)

def encode(path, frames, codec="libx264", rate=30, options=None, pix_fmt="yuv420p", pts=None,
           before=None, aspect=None, rotation=0, color_range=None):
    """Write frames to a video file; pts in units of 1/1000 s, if given."""
    with av.open(str(path), "w") as container:
        others = before(container) if before else []
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.codec_context.thread_count = 1  # libvpx's threads wait for each other in loops
        if pts is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for name, value in dict(sample_aspect_ratio=aspect, color_range=color_range).items():
            if value:
                setattr(stream.codec_context, name, value)
        container.mux(others)
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame = frame.reformat(format=pix_fmt, dst_color_range=color_range, threads=1)
            if pts is not None:
                frame.pts, frame.time_base = int(pts[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # root's is real-time after AV1
    return str(path)

class FixedClip:
    """Given times, the whole picture."""
    def __init__(self, times, flip=False):
        self.fixed, self.flip = np.asarray(times, dtype=float), flip
    def times(self, seconds):
        return self.fixed
    def box(self, width, height):
        self.upright = width, height
        return (0, 0, 1, 1), self.flip

def full_decode(path):
    """All frames of the widest video stream and their seconds, by the plainest code there is."""
    with av.open(path) as container:
        stream = max(container.streams.video, key=lambda stream: stream.width)
        stream.codec_context.thread_count = 1
        frames = list(container.decode(stream))
        first = frames[0].pts or 0
        return frames, [float(((f.pts or 0) - first) * stream.time_base) for f in frames]

def rendered(frames, size, flip=False):
    """Frames through filters that have seen nothing before."""
    out = np.empty((len(frames), *size, 3), np.uint8)
    for frame, place in zip(frames, out):
        graph = train.crop_and_scale(frame, FixedClip([0], flip), size, 1.0)
        graph.vpush(frame)
        place[:] = graph.vpull().to_ndarray()
    return out

def read_at(path, times, size=(32, 32)):
    return train.read_clips(str(path), [FixedClip(times)], size)[0]

def assert_shown(path, times, frames, seconds):
    """A clip of these times consists of the frames, which begin at `seconds`, that are then on the
    screen."""
    shown = [max(i for i, s in enumerate(seconds) if s <= t + 1e-3) for t in times]
    expected = rendered([frames[i] for i in shown], (32, 32))
    assert np.array_equal(read_at(path, times), expected), f"other frames than {shown}"

X264 = dict(preset="medium", crf="30")
HEVC = "pools=none:log-level=none:"

def x264(parameters):
    return X264 | {"x264-params": parameters}

OPTIONS = {  # for groups of 12 frames, and with frames that are shown before those they refer to
    "libx264": x264("keyint=12:bframes=3"),
    "libx265": {"x265-params": HEVC + "keyint=12:bframes=4", "preset": "fast"},
    "libvpx-vp9": {"g": "12", "deadline": "realtime", "cpu-used": "6", "auto-alt-ref": "1",
                   "lag-in-frames": "10"},
    "libvpx": {"g": "12", "deadline": "good", "cpu-used": "5", "auto-alt-ref": "1",
               "lag-in-frames": "10"},
    "libsvtav1": {"g": "12", "preset": "10", "svtav1-params": "irefresh-type=1:lp=1"},
    "mpeg4": {"g": "12", "bf": "2", "b": "300k"}, "mpeg2video": {"g": "12", "bf": "2", "b": "600k"}}

CODECS = {  # file, encoder, other options, pixel format
    "H.264, closed groups": ("a.mp4", "libx264", x264("keyint=12:scenecut=0:bframes=3")),
    "H.264, open groups": ("a.mkv", "libx264", x264("keyint=12:scenecut=0:bframes=3:open-gop=1")),
    "H.264, 8 slices": ("a.mp4", "libx264", x264("keyint=12:bframes=3:slices=8")),
    "H.264, intra refresh": ("a.mp4", "libx264", x264("keyint=10:bframes=2:intra-refresh=1")),
    "H.264, interlaced": ("a.mkv", "libx264", x264("keyint=12:bframes=3:tff=1")),
    "H.264, start codes": ("a.ts", "libx264"), "H.264 in AVI": ("a.avi", "libx264"),
    "H.264, 10 bit": ("a.mp4", "libx264", None, "yuv420p10le"),
    "H.264, 4:4:4": ("a.mp4", "libx264", None, "yuv444p"), "HEVC": ("a.mp4", "libx265"),
    "HEVC, open groups, layers": ("a.mkv", "libx265", {
        "x265-params": HEVC + "keyint=12:open-gop=1:temporal-layers=2:bframes=4",
        "preset": "fast"}),
    "VP9": ("a.webm", "libvpx-vp9"), "VP8": ("a.webm", "libvpx"), "AV1": ("a.mkv", "libsvtav1"),
    "MPEG-4 in AVI": ("a.avi", "mpeg4"), "MPEG-4 in MP4": ("a.mp4", "mpeg4"),
    "MPEG-2": ("a.mpg", "mpeg2video"), "Motion JPEG": ("a.mkv", "mjpeg", {}, "yuvj420p")}

def encode_as(name, folder, frames):
    file, codec, options, pix_fmt = (*CODECS[name], None, None)[:4]
    return encode(folder / file, frames, codec, pix_fmt=pix_fmt or "yuv420p",
                  options=OPTIONS[codec] if options is None else options)

@pytest.mark.parametrize("name", CODECS)
def test_wanted_frames_are_those_of_a_full_decode_bit_for_bit(name, tmp_path, monkeypatch):
    """Also sets that reach over a key frame, where frames shown before it are decoded after it.
    Where time stamps can be trusted, no clip needs the way by a full decode."""
    path = encode_as(name, tmp_path, natural_frames(48))
    frames, seconds = full_decode(path)
    if path.endswith("avi"):
        seconds = [i / 30 for i in range(len(frames))]  # AVI stores no times
    elif "intra" not in name:
        monkeypatch.setattr(train, "read_plainly", None)
    whole, rng = rendered(frames, (48, 64)), np.random.default_rng(0)
    sets = [[a, 23, 24] for a in range(12, 23)] + [
        sorted(rng.choice(48, rng.integers(2, 7), replace=False))
        for _ in range(400 if LONG else 10)]
    for chosen in sets:
        got = read_at(path, [seconds[i] for i in chosen], (48, 64))
        assert np.array_equal(got, whole[chosen]), f"{name}: other frames than {chosen}"
    clips = [FixedClip(0.31 + np.arange(4) / 30), FixedClip(0.1 * np.arange(4), flip=True)]
    for clip, result in zip(clips, train.read_clips(path, clips, (48, 64))):
        shown = [max(i for i, s in enumerate(seconds) if s <= t + 1e-3) for t in clip.fixed]
        expected = rendered([frames[i] for i in shown], (48, 64), clip.flip)
        assert np.array_equal(result, expected), f"{name}: other frames than {shown}"

def test_packets_that_nothing_depends_on_are_not_decoded(tmp_path):
    """Of H.264 with B-frames far fewer frames are decoded than lie before a late one."""
    path = encode(tmp_path / "a.mp4", natural_frames(48),
                  options=x264("keyint=24:scenecut=0:bframes=3:b-adapt=0"))
    with train.open_video(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size]
        shown = sorted(packet.pts for packet in packets)
        decoder = stream.codec_context
        decoded = [f.pts for f in train.decode_needed(decoder, packets, {shown[40]: 40})]
        assert decoder.thread_count == 1
    assert shown[40] in decoded and shown[24] in decoded and min(decoded) >= shown[24]
    assert len(decoded) <= 12, f"{len(decoded)} frames were decoded"

@pytest.mark.parametrize("layers, skipped", [(1, "NONREF"), (2, "DEFAULT")])
def test_of_hevc_frames_are_skipped_in_a_single_temporal_layer_only(layers, skipped):
    """What no picture of its layer refers to may still be needed by the layers above it."""
    flags = []
    class Decoder:
        name, extradata = "hevc", bytes([1] + [0] * 20 + [layers << 3])
        skip_frame = property(None, lambda self, value: flags.append(value))
        decode = flush_buffers = lambda self, packet=None: []
    packets = [types.SimpleNamespace(pts=i, is_keyframe=i == 0) for i in range(3)]
    assert list(train.decode_needed(Decoder(), packets, {2: 2})) == []
    assert flags == [skipped, skipped, "DEFAULT"]

def test_frames_too_many_to_hold_are_decoded_twice_and_give_the_same_clips(tmp_path):
    frames = np.zeros((60, 720, 960, 3), np.uint8)  # 62 MB as yuv420p
    frames[:, :, :, 0] = np.arange(60)[:, None, None] * 4
    path = encode(tmp_path / "a.avi", np.concatenate([frames, frames[::-1]]), "mpeg4")
    assert_shown(path, np.arange(8) / 4, full_decode(path)[0], np.arange(120) / 30)

@pytest.mark.parametrize("rate", [10, 25, Fraction(30000, 1001), 50, 60])
def test_a_clip_covers_the_same_seconds_at_every_frame_rate(rate, tmp_path):
    count = int(3 * rate)  # a frame shows its number as eight stripes
    bits = (np.arange(count)[:, None] >> np.arange(8) & 1).astype(np.uint8) * 255
    frames = np.broadcast_to(bits.repeat(8, axis=1)[:, None, :, None], (count, 32, 64, 3))
    path, times = encode(tmp_path / "a.mp4", frames, rate=rate), 0.2 + np.arange(16) * 4 / 30
    got = read_at(path, times, (32, 64))[:, 16, 4::8, 1] > 128  # (16, 8)
    assert (got @ (1 << np.arange(8))).tolist() == [int((t + 1e-3) * rate) for t in times]

def test_times_count_from_the_first_frame_and_variable_rates_are_followed(tmp_path):
    pts = 5000 + np.cumsum([0, 33, 33, 200, 10, 10, 100, 33, 33, 33, 400, 33])
    path = encode(tmp_path / "a.mkv", natural_frames(12, 32, 32), pts=pts, options={"crf": "10"})
    frames, seconds = full_decode(path)
    assert_close(np.array(seconds), (pts - 5000) / 1000, 2e-3, "seconds")
    times = [0, 0.05, 0.2, 0.27, 0.28, 0.3, 0.5, 0.9, 5.0]
    assert_shown(path, times, frames, (pts - 5000) / 1000)

def test_missing_time_stamps_are_counted_and_what_an_edit_list_hides_is_not_shown(tmp_path):
    """A raw H.264 stream has none; its frames are shown at its rate, in the decoder's order."""
    path = encode(tmp_path / "a.h264", natural_frames(30, 32, 32), rate=25, options={"bf": "2"})
    with av.open(path) as container:
        rate, frames = float(container.streams.video[0].average_rate), [*container.decode(video=0)]
    assert_shown(path, np.arange(5) / 5, frames, np.arange(30) / rate)
    path = encode(tmp_path / "a.mp4", natural_frames(30, 32, 32), pts=np.arange(30) * 40 - 400,
                  options={"bf": "2"})
    with av.open(path) as container:
        assert any(packet.is_discard for packet in container.demux(video=0)), "no such edit list"
    frames, seconds = full_decode(path)
    assert len(frames) == 20 and frames[0].pts == 0
    assert_shown(path, np.arange(5) / 10, frames, seconds)

def test_a_video_shorter_than_a_clip_repeats_its_last_frame(tmp_path):
    one = encode(tmp_path / "one.mp4", natural_frames(1, 32, 32))
    clip = train.RandomClip(np.random.default_rng(0), 16, 4)
    got = train.read_clips(one, [clip], (32, 32))[0]
    assert (got == got[:1]).all()
    few = encode(tmp_path / "few.mp4", natural_frames(9, 32, 32))
    got = read_at(few, np.arange(16) * 4 / 30)
    assert (got[2:] == got[2]).all() and not (got[1] == got[2]).all()

@pytest.mark.parametrize("rotation, corner, aspect, upright", [
    (90, (56, 8), None, (32, 64)), (180, (56, 56), None, (64, 32)),  # counterclockwise
    (270, (8, 56), None, (32, 64)), (0, (8, 8), Fraction(2, 1), (128, 32))])
def test_turned_or_stretched_videos_are_cropped_as_shown(
        rotation, corner, aspect, upright, tmp_path):
    frames, clip = np.zeros((3, 32, 64, 3), np.uint8), FixedClip([0])
    frames[:, :16, :16] = 255  # white corner, top left as stored
    path = encode(tmp_path / "a.mp4", frames, rotation=rotation, aspect=aspect,
                  options={"crf": "1"})
    got = train.read_clips(path, [clip], (64, 64))[0, 0, :, :, 0]
    assert [(y, x) for y in (8, 56) for x in (8, 56) if got[y, x] > 128] == [corner]
    assert clip.upright == upright

@pytest.mark.parametrize("pix_fmt, color_range", [
    ("yuv420p", 1), ("yuv420p", 2), ("yuvj420p", 2), ("yuv444p", 1), ("yuv420p10le", 1)])
def test_colours_come_out_as_they_went_in(pix_fmt, color_range, tmp_path):
    colours = [[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]]
    colours = np.array(colours, np.uint8)[:, None, None]
    frames = np.broadcast_to(colours, (6, 35, 51, 3) if pix_fmt == "yuv444p" else (6, 36, 52, 3))
    path = encode(tmp_path / "a.mkv", frames, pix_fmt=pix_fmt, options={"crf": "1"},
                  color_range=color_range)
    got = read_at(path, np.arange(6) / 30, (30, 40)).astype(float)
    assert_close(got, np.broadcast_to(colours, got.shape).astype(float), 8, "colours")

def still(container, codec, side, pix_fmt, disposition, brightness=0):
    stream = container.add_stream(codec, rate=1)
    stream.height = stream.width = side
    stream.pix_fmt, stream.disposition = pix_fmt, disposition
    array = np.full((side, side, 3), brightness, np.uint8)
    frame = av.VideoFrame.from_ndarray(array, format="rgb24")
    return stream.encode(frame) + stream.encode(None)

def cover_art(container):
    return still(container, "mjpeg", 512, "yuvj420p", train.Disposition.attached_pic)

def silence(container):
    sound = container.add_stream("aac", rate=44100, layout="mono")
    samples = np.zeros((1, 44100), np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.rate, frame.pts = 44100, 0
    return sound.encode(frame) + sound.encode(None)

@pytest.mark.parametrize("before", [cover_art, silence])
def test_the_video_is_found_beside_cover_art_and_sound(before, tmp_path):
    path = encode(tmp_path / "a.mp4", natural_frames(6, 32, 48), before=before)
    with av.open(path) as container:
        frames = list(container.decode(next(s for s in container.streams.video if s.width == 48)))
    assert_shown(path, [0.1], frames, np.arange(6) / 30)

def test_of_several_video_streams_the_default_one_is_read(tmp_path):
    path = encode(tmp_path / "a.mkv", np.zeros((6, 32, 48, 3), np.uint8), before=lambda container:
                  still(container, "mpeg4", 16, "yuv420p", train.Disposition.default, 200))
    assert abs(read_at(path, [0]).mean() - 200) < 8

def test_random_crops_stay_within_area_and_aspect_and_starts_within_the_video():
    drawn = []
    for seed in range(300):
        clip = train.RandomClip(np.random.default_rng(seed), 16, 4)
        (x, y, w, h), flip = clip.box(340, 256)
        assert clip.box(340, 256) == ((x, y, w, h), flip)
        drawn.append((x, y, w * h, math.log(w * 340 / (h * 256)), flip))
        assert 0 <= x and 0 <= y and x + w <= 1 + 1e-9 and y + h <= 1 + 1e-9
        assert 0.5 - 1e-9 <= w * h <= 1 and 3 / 4 - 1e-9 <= w * 340 / (h * 256) <= 4 / 3 + 1e-9
        times = clip.times(np.arange(301) / 30)
        assert times[0] >= 0 and times[-1] <= 10 and np.allclose(np.diff(times), 4 / 30)
    drawn = np.array(drawn)
    assert (drawn.min(0) <= [0.01, 0.01, 0.52, math.log(0.8), 0]).all(), "not all of the range"
    assert (drawn.max(0) >= [0.3, 0.2, 0.9, math.log(1.25), 1]).all(), "not all of the range"
    assert abs(drawn[:, 4].mean() - 0.5) < 0.1
    for width, height, expected in ((1000, 100, (1 - 0.4 / 3, 0, 0.4 / 3, 1)),
                                    (100, 1000, (0, 1 - 0.4 / 3, 1, 0.4 / 3))):
        (x, y, w, h), _ = train.RandomClip(np.random.default_rng(0), 16, 4).box(width, height)
        assert (2 * x, 2 * y, w, h) == pytest.approx(expected)  # none fits: the middle

@pytest.fixture
def bad_files(tmp_path):
    """A folder of files that are no videos, and good.mp4."""
    data = Path(encode(tmp_path / "good.mp4", natural_frames(12, 32, 32))).read_bytes()
    (tmp_path / "text.mp4").write_text("this is a text\n" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(data[:len(data) // 2])
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    (tmp_path / "m3u.mp4").write_text(f"#EXTM3U\n#EXTINF:10,\nfile:{tmp_path}/good.mp4\n")
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, streams in (("sound", silence), ("cover", cover_art)):
        with av.open(str(tmp_path / f"{name}.mp4"), "w") as container:
            container.mux(streams(container))
    return tmp_path

def test_files_that_are_no_videos_are_refused_with_a_reason(bad_files):
    with av.open(str(bad_files / "list.mp4")) as container:
        assert len(list(container.decode(video=0))) == 12, "a harmless playlist proves nothing"
    names = {path.name for path in bad_files.iterdir()} - {"good.mp4"} | {"missing.mp4"}
    assert len(names) == 10
    for name in names:
        assert_refused(r"\w", read_at, bad_files / name, [0], kind=train.BadVideo)

@pytest.mark.parametrize("where", ["in the header", "in a frame", "in a frame, decoding all"])
def test_pictures_too_large_are_refused_wherever_it_shows(where, tmp_path, monkeypatch):
    path, real = encode(tmp_path / "a.mp4", natural_frames(2, 64, 64)), train.check_size
    monkeypatch.setattr(train, "MAX_PIXELS", 64 * 64 - 1)
    if where != "in the header":  # which says that all is well
        monkeypatch.setattr(train, "check_size", lambda picture: isinstance(
            picture, av.VideoStream) or real(picture))
    if "all" in where:
        monkeypatch.setattr(train, "read_needed", lambda *args: None)
    assert_refused("64 x 64 pixels, at most 4095", read_at, path, [0], kind=train.BadVideo)

def test_damaged_files_decode_or_are_reported(tmp_path):
    """Bits flipped, cut, zeroed, spliced: never a crash, a hang or a wrong shape."""
    rng, outcomes, sources = np.random.default_rng(0), Counter(), []
    for name in ("H.264, closed groups", "HEVC", "VP9", "AV1", "MPEG-4 in AVI", "MPEG-2"):
        sources.append(Path(encode_as(name, tmp_path, natural_frames(24, 48, 64))).read_bytes())
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
            other = data[:length] if trial % 2 else sources[(trial + 1) % 6][at:at + length]
            data[at:at + length] = other
        (tmp_path / "damaged").write_bytes(data)
        clips = [train.RandomClip(np.random.default_rng((trial, i)), 4, 4) for i in range(2)]
        try:
            got = train.read_clips(str(tmp_path / "damaged"), clips, (32, 32))
            assert got.shape == (2, 4, 32, 32, 3)
            outcomes["decoded"] += 1
        except train.BadVideo as reason:
            assert str(reason)
            outcomes["reported"] += 1
    print(dict(outcomes))
    assert min(outcomes["decoded"], outcomes["reported"]) > 0

def test_thousands_of_clips_leave_descriptors_threads_and_memory_as_they_were(tmp_path):
    paths = [encode_as(name, tmp_path, natural_frames(24, 48, 64))
             for name in ("H.264, closed groups", "VP9", "MPEG-4 in AVI")] + [tmp_path / "bad.mp4"]
    paths[3].write_bytes(Path(paths[0]).read_bytes()[:3000])
    total, settled = (3000, 300) if LONG else (300, 100)
    for k in range(1, total + 1):
        with contextlib.suppress(train.BadVideo):
            clip = train.RandomClip(np.random.default_rng(k), 4, 4)
            train.read_clips(str(paths[k % 4]), [clip], (32, 32))
        if k in (settled, total):
            pages = int(Path("/proc/self/statm").read_text().split()[1])  # resident
            used = [len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")]
            used.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
            before = used if k == settled else before
    print(f"descriptors, threads, MB: {before} after {settled} clips, {used} after {total}")
    assert used[:2] == before[:2] and used[2] < before[2] + 8

# ------------------------------------------------------------------------------- lists and batches

@pytest.mark.parametrize("line, path, label", [
    ("a.mp4", "a.mp4", None), ("a.mp4 3", "a.mp4", "3"), ("a.mp4,3", "a.mp4", "3"),
    ("my dir/a b.MP4 7", "my dir/a b.MP4", "7"), ("a.mp4\t2 ", "a.mp4", "2"),
    ("a,b.webm, playing guitar", "a,b.webm", "playing guitar"), ('"a, b.mp4",5', "a, b.mp4", "5"),
    ("a.mp4 copy.mp4 3", "a.mp4 copy.mp4", "3"), ('my "best".mp4 3', 'my "best".mp4', "3")])
def test_lines_of_a_list_file_are_read_as_meant(line, path, label, tmp_path):
    (tmp_path / "list.txt").write_text(f"{line}\n")
    paths, labels = train.list_videos(tmp_path / "list.txt")
    assert [os.fsdecode(one) for one in paths] == [str(tmp_path / path)]
    assert labels == (label and (label,))

def test_a_folder_and_a_list_of_it_hold_the_same_videos(tmp_path, capsys):
    for name in ("elsewhere/two.mp4", "set/a/one.mp4", "set/a/x y.AVI", "set/a/notes.txt",
                 "set/a/._one.mp4", "set/README"):  # macOS writes ._one.mp4 beside one.mp4
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "list.csv").write_bytes("\ufeffset/a/one.mp4 a\r\n\r\nset/a/x y.AVI a\r\n"
                                        "set/b/two.mp4,b\r\n".encode())
    expected = [os.fsencode(tmp_path / "set" / name)
                for name in ("a/one.mp4", "a/x y.AVI", "b/two.mp4")]
    for data in (tmp_path / "set", tmp_path / "list.csv"):
        paths, labels = train.list_videos(str(data))
        assert paths.dtype.kind == "S"  # one array of bytes
        assert (paths.tolist(), labels) == (expected, ("a", "a", "b"))
        assert not capsys.readouterr().out
    (tmp_path / "set" / "stray.mp4").touch()
    assert train.list_videos(tmp_path / "set")[1].count(None) == 1
    assert train.list_videos(tmp_path / "elsewhere")[1] is None  # a flat folder
    assert_refused("stray.mp4 has no label", finetune.labelled, str(tmp_path / "set"))

def test_lists_in_any_shape_give_videos_or_one_clear_line(tmp_path):
    rng = random.Random(0)
    pieces = [b"a.mp4", b" ", b",", b"\t", b'"', b"\r\n", b"\n", b"\xff\xfe", b"\xef\xbb\xbf",
              b"x" * 10000, b"/", b"..", "\u00e9\u4e2d".encode(), b"3", b"label", b"\0", b".avi"]
    for _ in range(2000 if LONG else 300):
        text = b"".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
        (tmp_path / "list.txt").write_bytes(text)
        try:
            paths, labels = train.list_videos(tmp_path / "list.txt")
            assert len(paths) and not any(b"\0" in path for path in paths)
        except train.InputError as error:
            assert "\n" not in str(error)

@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of seven small videos."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(7):
        frames = train.moving_scene(np.random.default_rng(i), train.MOVES[i], 20, 32)
        train.write_video(folder / f"{i}.mp4", frames, 30)
    return folder

def make_clips(folder, **changes):
    given = dict(seed=3, repeat=2, frames=4, stride=2, size=(16, 16), noise=("agnostic", (2, 2, 2)))
    return train.VideoClips(train.list_videos(folder)[0], **given | changes)

def test_samples_are_the_same_with_any_number_of_workers_and_processes(videos, monkeypatch):
    monkeypatch.setattr(train, "of_all_processes", lambda items, args: items)
    def batches(workers, rank=0, world=1):
        args = argparse.Namespace(workers=workers, rank=rank, world=world, batch_size=4 // world,
                                  accum=2, steps=3, device="cpu", data_timeout=60)
        return list(train.batches_on_device(make_clips(videos), args, 0, []))
    def assert_same(a, b):
        for key in ("video", "noise"):
            assert all(torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True))
    alone = batches(0)
    assert_same(alone, batches(1))
    assert_same(alone, batches(3))
    ranks = zip(batches(1, 0, 2), batches(1, 1, 2))
    assert_same(alone, [{key: torch.cat([a[key], b[key]]) for key in a if torch.is_tensor(a[key])}
                        for a, b in ranks])
    assert [k for batch in alone for k in batch["sample"][::2]] == list(range(24))
    video = alone[0]["video"]
    assert not torch.equal(video[0], video[1]), "the repeats of a video are different clips"

@pytest.mark.parametrize("kind", [train.RandomClip, finetune.SegmentClip])
def test_in_fine_tuning_the_repeats_are_crops_of_one_clip_in_time(kind, videos, monkeypatch):
    taken = []
    monkeypatch.setattr(train, "read_clips", lambda path, clips, size: taken.extend(
        (tuple(clip.times(np.arange(60) / 30)), clip.box(4, 3)) for clip in clips) or np.zeros(0))
    for one_time, times in ((True, 1), (False, 3)):
        taken.clear()
        make_clips(videos, repeat=3, kind=kind, one_time=one_time)[5]
        assert [len(set(seen)) for seen in zip(*taken)] == [times, 3]

def test_every_pass_takes_every_video_once_in_a_new_order(videos):
    clips = make_clips(videos)
    passes = [[clips.video_of(k) for k in range(turn * 7, turn * 7 + 7)] for turn in range(3)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert passes[0] != passes[1] != passes[2] and len(clips) == 7

def test_a_bad_video_is_replaced_by_the_same_other_one_every_time(videos, tmp_path):
    clips = make_clips(videos, labels=[*range(7), -1])
    clips.paths = np.append(clips.paths, os.fsencode(tmp_path / "missing.mp4"))
    bad = next(k for k in range(8) if clips.video_of(k) == 7)
    one, two = clips[bad], clips[bad]
    assert one["bad"] == [f"{tmp_path}/missing.mp4: no such file, or not a regular file"]
    assert all(torch.equal(one[key], two[key]) for key in ("video", "label", "noise"))
    assert 0 <= one["label"][0] == one["label"][1] < 7 and one["sample"] == [bad, bad]
    assert clips.name(bad) == f"{tmp_path}/missing.mp4"

@pytest.mark.parametrize("good, stops", [(0, "100 videos in a row"), (1, "is probably wrong"),
                                         (7, None)])
def test_a_list_that_is_mostly_wrong_stops_the_run(good, stops, videos, tmp_path, capsys):
    names = [f"{videos}/{i}.mp4" for i in range(good)]
    names += [f"{tmp_path}/missing{i}.mp4" for i in range(9 if good < 7 else 3)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    command = arguments(tmp_path / "list.txt", tmp_path / "run", "--steps", "8", "--workers", "0")
    with pytest.raises(train.InputError, match=stops) if stops else contextlib.nullcontext():
        train.main(command)
    if not stops:
        said = capsys.readouterr()
        assert "3 of 10 videos could not be read:\n" in said.out
        for i in range(3):  # each is named once during the run, and once at its end
            assert said.err.count(f"missing{i}.mp4:") == said.out.count(f"missing{i}.mp4:") == 1

@pytest.mark.parametrize("move", train.MOVES)
def test_a_generated_scene_moves_as_its_class_says(move):
    """Least squares for the velocity from what changes where the picture is sloped (Lucas and
    Kanade); shapes have steep edges and are left out."""
    angle, velocities = train.MOVES.index(move) * math.pi / 4, []
    for seed in range(6):
        video = train.moving_scene(np.random.default_rng(seed), move, 12, 64)
        video = video.astype(float).mean(-1)  # (T, H, W)
        middle, change = (video[1:] + video[:-1]) / 2, np.diff(video, axis=0)
        down, across = np.gradient(middle, axis=(1, 2))
        smooth = (np.hypot(down, across) < 20) & (abs(change) < 30)
        slopes = np.stack([across[smooth], down[smooth]], 1)
        (x, y), *_ = np.linalg.lstsq(slopes, -change[smooth], rcond=None)
        velocities.append((x, -y))  # pixels a frame, y upwards
        turned = (math.atan2(-y, x) - angle + math.pi) % (2 * math.pi) - math.pi
        assert abs(turned) < math.radians(22.5) and 0.6 < math.hypot(x, y) < 2.2, velocities

ALONE = argparse.Namespace(rank=0, world=1)

def test_generated_videos_are_all_there_or_none_and_the_same_each_time(tmp_path, monkeypatch):
    def full(path, *_, **__):
        path.touch()
        if path.name == "0001.mp4":
            raise OSError(errno.ENOSPC, "No space left on device")
    small, x = dict(per_class=2, held_out=1, frames=8, size=32), tmp_path / "x"
    with monkeypatch.context() as patch, pytest.raises(train.InputError, match="room: No space"):
        patch.setattr(train, "write_video", full)
        train.generate_videos(x / "a", ALONE, **small)
    assert not list(x.iterdir())
    for name in "ab":
        train.generate_videos(x / name, ALONE, **small)
    files = sorted(path.relative_to(x / "a") for path in x.glob("a/**/*.mp4"))
    assert len(files) == 24 and len(list(x.iterdir())) == 2
    for file in files:
        assert (x / "a" / file).read_bytes() == (x / "b" / file).read_bytes()
    video = train.moving_scene(np.random.default_rng(0), "up", 32, 64)  # as they are used
    for name in "vwxyz":
        train.write_video(tmp_path / f"{name}.mp4", video, 30, crf="18")
    assert len({(tmp_path / f"{name}.mp4").read_bytes() for name in "vwxyz"}) == 1

# ------------------------------------------------------------------------------------ pre-training

TINY = ("--model tiny --frames 4 --stride 2 --size 16 --patch 2x8x8 --mask-ratio 0.75 --repeat 2 "
        "--batch-size 2 --lr 0.5 --device cpu --save-every 2 --decode-ratio 1 --norm-pix "
        "--clip 0.02 --warmup 0.15").split()

def arguments(folder, out, *more):
    return ["--data", str(folder), "--out", str(out), *TINY, *" ".join(map(str, more)).split()]

def losses_of(folder):
    return [row["loss"] for row in rows_of(folder / "log.jsonl") if "loss" in row]

def show_it(folder, init, out):
    """Reconstruct the first video of a folder."""
    train.main(["--reconstruct", f"{folder}/0.mp4", "--init", str(init), "--out", str(out),
                "--device", "cpu"])

def tensors(path):
    """Model and optimizer state of a checkpoint, as one flat dict."""
    content = train.read_checkpoint(path)
    flat = content["model"] | {"step": torch.tensor(content["step"])}
    for index, state in content["optimizer"]["state"].items():
        flat |= {f"optimizer {index} {key}": value for key, value in state.items()}
    return flat

def assert_same_run(a, b, tolerance=0.0):
    a, b = tensors(a / "last.pt"), tensors(b / "last.pt")
    assert a.keys() == b.keys()
    for key in a:
        assert_close(a[key], b[key], tolerance, key)

def run_script(*command, check=0, timeout=120, cwd=HERE):
    """Run a script of this repository and look at its exit status; nothing of it stays behind."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == check, f"exit status {process.returncode}\n{out}\n{err}"
    return subprocess.CompletedProcess(command, process.returncode, out, err)

def torchrun(*command, **options):
    return run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command,
                      **options)

@pytest.fixture
def script(tmp_path):
    """A script that runs train.py after the lines it is given."""
    def write(lines, name="script.py"):
        (tmp_path / name).write_text(  # a shell's background processes ignore SIGINT
            f"import os, signal, sys\nsys.path.insert(0, {str(HERE)!r})\nimport train\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"{lines}\ntrain.run_script(train.main)\n")
        return tmp_path / name
    return write

def test_the_defaults_are_the_papers_recipe_and_steps_and_rates_follow_from_the_batch(capsys):
    args = train.parse_arguments(["--data", "videos"])
    paper = dict(model="large", frames=16, stride=4, size=(224, 224), patch=(2, 16, 16),
                 mask_ratio=0.9, strategy="agnostic", target="frame", norm_pix=True, epochs=200,
                 steps=None, repeat=4, accum=1, lr=1.6e-3, warmup=0.15, weight_decay=0.05,
                 clip=0.02, checkpointing=False)
    assert {key: getattr(args, key) for key in paper} == paper
    clips = train.VideoClips(["a.mp4"], seed=0, repeat=4, frames=16, stride=4, size=(224, 224))
    assert clips.look[2:] == ((0.5, 1), True)
    train.setup(args)
    if not torch.cuda.is_available():
        assert (args.device, args.amp, args.compile) == ("cpu", "off", False)
        assert (args.batch_size, args.workers) == (2, 1)
        said = capsys.readouterr().out
        assert said.startswith("for 0 GPUs and ") and "--batch-size 2, --workers 1\n" in said
    args.world, args.batch_size, args.accum = 8, 16, 4
    train.plan(args, 240_000, 512)
    assert args.steps == 200 * 240_000 / 512 and args.peak_lr == 1.6e-3
    assert args.first_lr == args.last_lr == pytest.approx(1.6e-5)
    for more, steps in (("--epochs 36", 42), ("--steps 10", 10)):  # ceil(36 * 7 / 6)
        args = train.parse_arguments(arguments("x", "x", "--accum 3", more))
        args.world = 1
        train.plan(args, 7, 512)
        assert args.steps == steps and args.peak_lr == pytest.approx(0.5 * 6 / 512)
        line = f"{steps} steps of 6 x 2 clips = {steps * 6 / 7:.1f} passes over 7 videos; "
        out = capsys.readouterr().out
        assert line + "learning rate 0.5 x 6 / 512 = 0.00586" in out
        assert "under a hundredth of --lr" not in out
    args.accum = 1
    train.plan(args, 7, 512)
    assert "under a hundredth of --lr" in capsys.readouterr().out
    assert train.parse_arguments(["--epochs", "200"]).steps is None

@pytest.mark.parametrize("target", ["frame", "patch"])
def test_the_error_is_compared_with_the_colours_of_the_nearest_visible_patches(target):
    model = MaskedAutoencoder(**SMALL, norm_pix=False, target=target)
    video = torch.randint(0, 256, (2, 4, 12, 20, 3), dtype=torch.uint8)
    noise, errors, others = torch.rand(2, *GRID), [], []
    filled, mask = model.reconstruct(video.permute(0, 4, 1, 2, 3), 0.8, noise)
    frames = 1 if target == "frame" else 2  # of a patch
    for clip, ours, hidden in zip(video / 255, filled, mask):
        patch = lambda t, y, x: clip[2 * t:2 * t + frames, 4 * y:4 * y + 4, 4 * x:4 * x + 4]
        visible = [place for place in np.ndindex(*GRID) if not hidden[place]]
        for t, y, x in (place for place in np.ndindex(*GRID) if hidden[place]):
            apart = [math.dist((t, y, x), place) for place in visible]
            near = [place for d, place in zip(apart, visible) if d < min(apart) + 1e-9]
            colour = torch.stack([patch(*place).mean((0, 1, 2)) for place in near]).mean(0)
            others.append((patch(t, y, x) - colour).square().mean())
            cut = ours[:, frames * t:frames * (t + 1), 4 * y:4 * y + 4, 4 * x:4 * x + 4]
            errors.append((patch(t, y, x) - cut.permute(1, 2, 3, 0)).square().mean())
    ours, guess = train.errors_on_hidden(model, video, noise, 0.8) / (48 * frames)  # of numbers
    assert_close([ours, guess], [sum(errors), sum(others)], 1e-3)

def test_the_error_that_is_printed_at_the_end_is_that_of_64_videos(videos, tmp_path, capsys):
    train.main(arguments(videos, tmp_path, "--steps 1 --repeat 1 --no-norm-pix --workers 0"))
    content, clips = train.load_init(tmp_path / "last.pt"), make_clips(videos, seed=0, repeat=1)
    model = train.build(MaskedAutoencoder, content["model_args"], content["model"])
    batch = train.collate([clips[k] for k in range(64)])
    ours, other = train.errors_on_hidden(model, batch["video"], batch["noise"], 0.75)
    said = f"error on hidden patches: {ours / other:.2f} of that of the nearest"
    assert said in capsys.readouterr().out

def test_a_run_ends_with_a_chart_of_its_loss_beside_that_of_the_mean(tmp_path, capsys):
    losses = [3 - i / 50 for i in range(100)]
    (tmp_path / "log.jsonl").write_text("".join(f'{{"loss": {loss}}}\n' for loss in losses))
    train.report(argparse.Namespace(out=tmp_path), 0.5)
    said = "last 5 steps 1.0600, of always predicting the mean 0.5000"
    assert said in capsys.readouterr().out
    lines = ElementTree.parse(tmp_path / "loss.svg").iter("{http://www.w3.org/2000/svg}polyline")
    smooth, mean = ([tuple(map(float, point.split(","))) for point in line.get("points").split()]
                    for line in lines)
    place = lambda x, y: (60 + 420 * (x - 5) / 95, 320 - 280 * y / (1.05 * (3 - 0.04)))
    assert len(smooth) == 96 and smooth[-1] == pytest.approx(place(100, 1.06), abs=0.06)
    assert np.allclose(smooth, [place(i, np.mean(losses[i - 5:i])) for i in range(5, 101)],
                       atol=0.06)
    assert np.allclose(mean, [place(5, 0.5), place(100, 0.5)], atol=0.06)

def test_a_gradient_that_is_not_finite_moves_nothing():
    model, scaler = torch.nn.Linear(3, 2), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for value in (1.0, math.nan, 2.0):
        before = model.weight.detach().clone(), model.bias.detach().clone()
        loss = (model(torch.ones(1, 3)) * value).sum()
        loss.backward()
        train.update(optimizer, scaler, model.parameters(), 0.02, loss.detach())
        for old, new in zip(before, model.parameters()):
            assert torch.equal(old, new) != math.isfinite(value)
    assert all(state["step"] == 2 for state in optimizer.state.values())

def test_the_log_tells_how_long_a_step_takes_and_waits(videos, tmp_path, monkeypatch):
    """On a clock of its own: a batch takes 1 s to come, a micro-batch 2 s to compute, the update
    4 s, the pictures 100 s. The first batch of a step is awaited at the end of the step before."""
    now = [0.0]
    def taking(seconds, function):
        def slow(*args, **options):
            result = function(*args, **options)
            now[0] += seconds
            return result
        return slow
    monkeypatch.setattr(train, "mark", lambda device: now[0])
    for owner, name, seconds in ((train, "collate", 1), (MaskedAutoencoder, "forward", 2),
                                 (train, "update", 4), (train, "write_pictures", 100)):
        monkeypatch.setattr(owner, name, taking(seconds, getattr(owner, name)))
    train.main(arguments(videos, tmp_path, "--steps 4 --accum 3 --workers 0"))
    for step, row in enumerate(rows_of(tmp_path / "log.jsonl"), start=1):
        seconds = 10 + (waits := 3 if step < 4 else 2)
        wanted = dict(step=step, epoch=step * 6 / 7, data_wait=waits / seconds, peak_mem_gb=None,
                      clips_per_s=3 * 2 * 2 / seconds)
        assert {key: row[key] for key in wanted} == pytest.approx(wanted)
        assert set(row) == {*wanted, "loss", "lr", "grad_norm"}

def plain_steps(model, loss_of, scale_of, rates, batches, betas, clip):
    """A loop anybody would write: no accumulation, no fused optimizer, no autocast. Yields loss and
    gradient norm. scale_of(name of a parameter) -> its learning rate, relative to the others'."""
    groups = [dict(params=[p], weight_decay=0.0 if p.dim() == 1 else 0.05, scale=scale_of(name))
              for name, p in model.named_parameters()]
    optimizer = torch.optim.AdamW(groups, betas=betas, foreach=False)
    for rate, batch in zip(rates, batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
        for g in gradients:
            g *= min(1, clip / norm)
        optimizer.step()
        yield loss.item(), norm

def assert_run_is(folder, model, steps):
    rows = [row for row in rows_of(folder / "log.jsonl") if "loss" in row]
    for row, (loss, norm) in zip(rows, steps, strict=True):
        assert (row["loss"], row["grad_norm"]) == pytest.approx((loss, norm), rel=1e-4)
    for key, tensor in train.read_checkpoint(folder / "last.pt")["model"].items():
        assert_close(tensor, model.state_dict()[key], 2e-5, key)

def plain_batches(clips, *keys):
    """The batches of four steps of 2 x 2 videos, as tuples."""
    for step in range(4):
        items = [clips[4 * step + i] for i in range(4)]
        video, *others = (torch.cat([item[key] for item in items]) for key in ("video", *keys))
        yield video.permute(0, 4, 1, 2, 3), *others

def test_a_run_is_nothing_but_a_plain_loop_over_its_samples(videos, tmp_path, capsys):
    train.main(arguments(videos, tmp_path, "--steps 4 --accum 2 --workers 0 --warmup 0.5"))
    torch.manual_seed(0)
    size = dict(frames=4, height=16, width=16, patch=(2, 8, 8))
    model = MaskedAutoencoder(**mae_st.SIZES["tiny"], **size)
    batches = list(plain_batches(make_clips(videos, seed=0), "noise"))
    rates = [0.5 * 4 / 512 * (0.01 + 0.99 * share) for share in (0, 0.5, 1, 0.5)]
    loss_of = lambda video, noise: model(video, 0.75, noise)
    steps = plain_steps(model, loss_of, lambda name: 1, rates, batches, (0.9, 0.95), 0.02)
    assert_run_is(tmp_path, model, steps)
    model.decoder_pred.weight.data.zero_()
    model.decoder_pred.bias.data.zero_()  # normalised patches have a mean of 0
    said = re.search(r"loss of always predicting the mean: ([\d.]+)", capsys.readouterr().out)[1]
    assert float(said) == pytest.approx(loss_of(*batches[0]).item(), abs=1e-4)

def test_a_run_compiles_once_and_its_precision_is_as_asked(videos, tmp_path, monkeypatch):
    """The whole loop, with saving and pictures in between; without a compiler behind it."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for name, flags in (("plain", "--no-compile"), ("one", "--compile"), ("bf16", "--amp bf16")):
        train.main(arguments(videos, tmp_path / name, "--steps 5 --workers 0", flags))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_same_run(tmp_path / "plain", tmp_path / "one", tolerance=1e-6)
    exact, rounded = (losses_of(tmp_path / name)[0] for name in ("plain", "bf16"))
    assert 1e-5 < abs(rounded - exact) < 1e-2

def end_during(step, main, command):
    """Run it until somebody ends the process during this step."""
    def check(row, *others):
        if row["step"] == step:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "check_finite", check)
        main(command)

def test_four_steps_equal_two_and_two_with_another_number_of_workers(videos, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main(arguments(videos, whole, "--steps 4 --workers 1"))
    end_during(3, train.main, arguments(videos, parts, "--steps 4 --workers 1"))
    assert train.read_checkpoint(parts / "last.pt")["step"] == 2
    train.main(arguments(videos, parts, "--steps 4 --workers 0"))
    assert_same_run(whole, parts)
    a, b = ([(row["step"], row["loss"]) for row in rows_of(run / "log.jsonl")]
            for run in (whole, parts))
    assert a == b and [step for step, _ in a] == [1, 2, 3, 4]

@pytest.fixture(scope="module")
def two_processes(videos, tmp_path_factory):
    """A run of two processes, two micro-batches each: 8 videos a step, more than there are."""
    out = tmp_path_factory.mktemp("two")
    torchrun("train.py", *arguments(videos, out, "--steps 8 --accum 2"))
    return out

def test_two_processes_accumulating_equal_one_process(videos, two_processes, tmp_path):
    train.main(arguments(videos, tmp_path, "--steps 8 --batch-size 8"))
    assert_close(losses_of(tmp_path), losses_of(two_processes), 2e-5, "losses")
    # AdamW divides by the size of the gradient: a rounding error can grow to a part of the rate.
    assert_same_run(tmp_path, two_processes, tolerance=5e-4)

def test_every_number_that_the_loss_comes_with_is_logged_as_its_mean(videos, tmp_path, monkeypatch):
    fit, seen = train.fit, []
    def with_brightness(args, model, optimizer, clips, loss_of, keep, at_save):
        def own(model, batch):
            seen.append(float(batch["video"].float().mean()))
            return loss_of(model, batch) | dict(brightness=torch.tensor(seen[-1]))
        fit(args, model, optimizer, clips, own, keep, lambda step: dict(step=step, note="saved"))
    monkeypatch.setattr(train, "fit", with_brightness)
    train.main(arguments(videos, tmp_path, "--steps 2 --accum 2"))
    *rows, note = rows_of(tmp_path / "log.jsonl")
    means = [(seen[0] + seen[1]) / 2, (seen[2] + seen[3]) / 2]
    assert [row["brightness"] for row in rows] == pytest.approx(means)
    assert note == dict(step=2, note="saved")

def first_picture(path):
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")

def test_pictures_show_original_masked_and_reconstruction(videos, tmp_path):
    run, show = tmp_path / "run", tmp_path / "show"
    train.main(arguments(videos, run, "--steps 2"))
    show_it(videos, run / "last.pt", show)
    for folder in (run, show):
        image = first_picture(folder / "reconstruction.png")
        assert image.shape == (4 * 3 * 128, 2 * 128, 3)  # two frames of four clips, enlarged
        original, masked = image[:128].astype(int), image[128:256].astype(int)
        gray = (masked == 128).all(-1)
        assert 0.5 < gray.mean() < 1 and abs(original - masked)[~gray].max() == 0
        assert first_picture(folder / "reconstruction.mp4").shape == (4 * 128, 3 * 128, 3)
        assert not list(folder.glob("unfinished*"))
    video = torch.randint(256, (1, 4, 12, 20, 3), dtype=torch.uint8)
    for target, frames in (("frame", video[:, ::2]), ("patch", video)):
        train.write_pictures(tmp_path, MaskedAutoencoder(**SMALL, target=target), video, 0.5,
                             torch.rand(1, *GRID))
        image = first_picture(tmp_path / "reconstruction.png")[:72:6, ::6]
        assert np.array_equal(image, np.concatenate(list(frames[0].numpy()), axis=1))
    assert_refused("--reconstruct gone.mp4: no such file", train.main, [
        "--reconstruct", "gone.mp4", "--init", f"{tmp_path}/run/last.pt", "--device", "cpu"])

def test_wrong_input_is_one_line(videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "bare.txt").write_text("gone\n")
    (tmp_path / "out" / "log.jsonl").mkdir(parents=True)
    os.mkfifo("pipe")
    cases = [("--data nowhere", "nowhere: no such folder"), ("--data empty", "no video in it"),
        ("--data pipe", "pipe: no such folder or list file"),
        ("--data bare.txt", "'gone' names no video"), ("--frames 5", "frames 5.*2"),
        ("--size 20", "height 20.*8"), ("--size 8192x8", "cannot write.*reconstruction"),
        ("--mask-ratio 0", "mask ratio 0"), ("--mask-ratio 1", "mask ratio 1"),
        ("--mask-ratio 2", "--mask-ratio: 2 is not from 0 to 1"), ("--out file", "--out file can"),
        ("--out out", "--out out cannot.*Is a directory"), ("--strategy tubes", "invalid choice"),
        ("--patch 2x8", "2x8 is not 3 numbers"), ("--size big", "invalid size value: 'big'"),
        ("--size 9000", "9000 is not 2 numbers from 1 to 8192"), ("--steps -1", "not from 1"),
        ("--steps two", "--steps: invalid number value: 'two'"), ("--lr nan", "nan is not from"),
        ("--init gone.pt", "gone.pt is no file"), ("--reconstruct x.mp4", "needs a trained model"),
        ("--amp fp16", "needs a GPU"), ("--colour red", "unrecognized"),
        ("--epoch 3", "unrecognized"), ("--model giant", "invalid choice"),
        ("--data-timeout 1000000000", "not from 1 to 86400"), ("--keep 101", "not from 1 to 100"),
        ("--frames 2000", "not from 1 to 1024"), ("--workers 1000", "not from 0 to 256"),
        ("--batch-size 100000", "not from 1 to 65536")]
    cases += [(f"--{name}=", f"--{name}: it is empty")
              for name in ("data", "out", "init", "reconstruct")]
    for change, words in cases:
        command = arguments(videos, "new", "--steps 2 --workers 0", change)
        assert_refused(words, train.main, command)
    assert_refused("mask ratio 1.0", train.main, ["--mask-ratio", "1", "--device", "cpu"])
    assert not Path("data").exists()  # it is refused before any video is written
    result = run_script("train.py", *arguments("nowhere", "out"), check=1)
    assert result.stderr.splitlines()[-1].startswith("error: nowhere: no such")
    assert "Traceback" not in result.stderr

def test_a_run_with_other_arguments_is_not_continued(videos, tmp_path, capsys):
    def command(folder, *more):
        return arguments(folder, tmp_path / "run", "--steps 2", *more)
    train.main(command(videos))
    for change, words in (("--seed 1", "seed 0 -> 1"), ("--steps 3", "steps 2 -> 3"),
                          ("--accum 2", "videos_per_step 2 -> 4"), ("--amp bf16", "off -> bf16")):
        assert_refused(words, train.main, command(videos, change))
    moved = shutil.copytree(videos, tmp_path / "moved")
    train.main(command(moved))  # the same videos
    assert "nothing is left to train, for other code" in capsys.readouterr().out
    (moved / "6.mp4").unlink()
    assert_refused(r"checksum_of_list \d+ -> \d+", train.main, command(moved))

def test_check_data_names_the_bad_files(bad_files, videos, capsys):
    check = "--check-data --device cpu --data".split()
    assert train.main([*check, str(bad_files), "--workers", "2"]) == 1
    out = capsys.readouterr().out
    bad = {path.name for path in bad_files.glob("*.mp4")} - {"good.mp4", "folder.mp4"}
    assert len(bad) == 8 and all(f"{name}: " in out for name in bad)
    assert "good.mp4:" not in out and "9 videos, 8 bad" in out
    (bad_files / "odd").mkdir()  # a name that is no text
    Path(os.fsdecode(os.fsencode(bad_files / "odd") + b"/\xff.mp4")).write_bytes(b"nothing")
    assert not train.main([*check, str(videos), "--workers", "0"])
    said = run_script("train.py", *check, bad_files / "odd", check=1).stdout
    assert "\\udcff.mp4: no video: Invalid data" in said
    assert_refused("--check-data reads the videos of --data", train.main, ["--check-data"])

# ------------------------------------------------------------------------ what happens to long runs

def test_a_damaged_checkpoint_is_told_and_never_loaded(videos, tmp_path, capsys):
    run, other, silent = tmp_path / "run", tmp_path / "last.pt", 0
    command = arguments(videos, run, "--steps 4")
    train.main(command)
    data, rng = (run / "last.pt").read_bytes(), np.random.default_rng(0)
    reference = tensors(run / "last.pt")
    damages = [(kind, int(at)) for kind, few in (("cut", 10), ("flip", 20))
               for at in rng.integers(len(data), size=100 if LONG else few)]
    for kind, at in damages:
        flipped = bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1:]
        other.write_bytes(data[:at] + (flipped if kind == "flip" else b""))
        try:
            loaded = tensors(other)
            silent += 1  # then the byte was padding, and everything that counts is as written
            assert kind == "flip" and all(torch.equal(loaded[k], reference[k]) for k in reference)
        except train.InputError as problem:
            assert "\n" not in str(problem)
    assert silent < len(damages) / 4
    (run / "last.pt").write_bytes(data[:len(data) // 2])
    capsys.readouterr()
    train.main(command)
    assert re.search("last.pt is damaged.*trying the checkpoint before it.*last-1.pt after step 2 "
                     "of 4", capsys.readouterr().out, re.S)
    for path in run.glob("last*.pt"):
        path.write_bytes(b"")
    assert_refused("is damaged", train.main, command)

def test_as_many_checkpoints_are_kept_as_asked_for(videos, tmp_path):
    train.main(arguments(videos, tmp_path, "--steps 5 --save-every 1 --keep 3"))
    steps = {path.name: train.read_checkpoint(path)["step"] for path in tmp_path.glob("last*")}
    assert steps == {"last.pt": 5, "last-1.pt": 4, "last-2.pt": 3}

class Mischief:
    def __reduce__(self):
        return os.mkdir, ("mischief",)

def test_files_that_are_no_checkpoints_are_refused_and_code_in_them_does_not_run(
        videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(arguments(videos, tmp_path / "run", "--steps 2"))
    good, path = train.read_checkpoint(tmp_path / "run/last.pt"), tmp_path / "odd" / "last.pt"
    path.parent.mkdir()
    table, model, model_args = "encoder.pos_embed_temporal", good["model"], good["model_args"]
    odd = [[1, 2], torch.zeros(3), good | dict(model=3), good | dict(model={3: torch.zeros(1)}),
           good | dict(extra=Mischief()),
           {key: value for key, value in good.items() if key != "model"},
           good | dict(model=model | {table: torch.zeros(3, 128)}),
           dict(model=dict(wte=torch.zeros(3)), model_args=dict(n_layer=12))]
    odd_init = [good | dict(model=model | {table: model[table] * math.nan}),
                good | dict(model_args=model_args | dict(heads=0)),
                good | dict(model_args=model_args | dict(depth="two"))]
    odd_run = [good | dict(step="2"), good | dict(optimizer=None), good | dict(identity=[])]
    for content in odd + odd_init:
        torch.save(content, path)
        assert_refused("", show_it, videos, path, tmp_path / "show")
    for content in odd + odd_run:
        torch.save(content, path)
        assert_refused("", train.main, arguments(videos, path.parent, "--steps 2"))
    for pickled in (b"", b"not a pickle", b"\x80\x02K", b"\x80\x02}q\x00(X\x05", b"\x80\x02h\x05."):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (("data.pkl", pickled), ("version", b"3"), ("byteorder", b"little")):
                archive.writestr(f"last/{name}", data)
        assert_refused("damaged, or no checkpoint", train.load_init, path)
    os.mkfifo(tmp_path / "pipe.pt")
    for name in (tmp_path / "pipe.pt", "/dev/zero", tmp_path, "gone.pt"):
        assert_refused("is no file", train.load_init, name)
    assert not Path("mischief").exists()

def test_running_out_of_gpu_memory_is_one_line_that_says_what_to_change(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the manual")
    with pytest.raises(SystemExit) as ended:
        train.run_script(main)
    words = r"error: CUDA out of memory. .* 2 GiB. In training lower --batch-size .*\n"
    assert ended.value.code == 1 and re.fullmatch(words, capsys.readouterr().err)

def test_two_runs_cannot_share_a_folder_and_workers_do_not_hold_it(videos, tmp_path):
    args = argparse.Namespace(out=str(tmp_path), rank=0, world=1)
    with train.run_folder(args) as (log, *_):  # and a process that has the file open, like a worker
        worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE,
                                  pass_fds=[log.fileno()])
        result = run_script("train.py", *arguments(videos, tmp_path, "--steps", 1), check=1)
        assert "perhaps since another run" in result.stderr.splitlines()[-1]
    run_script("train.py", *arguments(videos, tmp_path, "--steps", 1))
    worker.communicate(b"\n")

def test_a_full_disk_stops_the_run_and_leaves_what_was_there_whole(videos, tmp_path, script):
    """A limit on the size of files stands for the full disk; the files were written without it."""
    files = [tmp_path / "run" / name for name in ("last.pt", "reconstruction.mp4",
                                                  "reconstruction.png")]
    train.main(arguments(videos, tmp_path / "run", "--steps 2"))
    before = [path.read_bytes() for path in files]
    for name, limit, out, steps in (("reconstruction.png", 2_000, tmp_path / "run", 2),
                                    ("last.pt", 100_000, tmp_path / "other", 3)):
        limited = script("import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
                         f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))")
        result = run_script(limited, *arguments(videos, out, "--steps", steps), check=1)
        line = result.stderr.splitlines()[-1]
        assert re.search(f"error: cannot write .*{name}; make room", line), line
        assert not list(out.glob("unfinished*")) and not (tmp_path / "other" / "last.pt").exists()
    assert [path.read_bytes() for path in files] == before
    files[1].unlink()
    train.main(arguments(videos, tmp_path / "run", "--steps 2"))  # writes it again
    assert [path.read_bytes() for path in files] == before

def test_a_loss_that_is_not_finite_stops_the_run(videos, tmp_path, monkeypatch):
    forward, calls = MaskedAutoencoder.forward, iter(range(100))
    monkeypatch.setattr(MaskedAutoencoder, "forward",
                        lambda *args: forward(*args) * (math.nan if next(calls) == 2 else 1))
    names = ", ".join(sorted(map(make_clips(videos, seed=0).name, (4, 5))))
    assert_refused(f"step 3 are not finite.*videos were {names}", train.main,
                   arguments(videos, tmp_path, "--steps 6"))
    assert train.read_checkpoint(tmp_path / "last.pt")["step"] == 2
    row = rows_of(tmp_path / "log.jsonl")[-1]
    assert row["step"] == 3 and row["loss"] is None

def test_a_signal_finishes_the_step_saves_and_the_same_command_goes_on(videos, tmp_path):
    """Also where Python's own way to start data workers is another one, as from 3.14 on."""
    flags = arguments(videos, tmp_path / "stopped", "--steps", 150, "--workers", 1,
                      "--save-every", 1000)
    as_in_314 = ("import multiprocessing, train; "
                 "multiprocessing.set_start_method('forkserver', force=True); "
                 f"train.run_script(lambda: train.main({flags}))")
    log, steps = tmp_path / "stopped" / "log.jsonl", [0]
    for number, command in ((signal.SIGTERM, ["-c", as_in_314]),
                            (signal.SIGINT, ["train.py", *flags])):
        process = subprocess.Popen([sys.executable, *command], cwd=HERE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        while process.poll() is None and not (
                log.exists() and log.read_text().count("\n") >= steps[-1] + 3):
            os.sched_yield()
        os.killpg(process.pid, number)  # to the data workers as well, as a terminal does
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err
        assert "saved; the same command goes on" in out and "Traceback" not in err
        assert "finishing the step, then saving" in err
        steps.append(train.read_checkpoint(tmp_path / "stopped" / "last.pt")["step"])
    assert 0 < steps[1] < steps[2] < 150
    for out in ("stopped", "whole"):
        train.main(arguments(videos, tmp_path / out, "--steps", 150, "--save-every", 1000))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")

def test_a_second_ctrl_c_or_a_late_signal_ends_the_run_at_once(videos, tmp_path, script):
    """Also while Python is inside C code, here reading from a pipe into which nobody writes."""
    during = script("""def check(*args):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    os.read(os.pipe()[0], 1)
train.check_finite = check""")
    run_script(during, *arguments(videos, tmp_path / "a", "--steps 3"), check=-signal.SIGINT)
    for name, status in (("SIGTERM", -signal.SIGTERM), ("SIGINT", 130)):
        after = script(f"fit = train.fit\ntrain.fit = lambda *args, **more: (fit(*args, **more), "
                       f"os.kill(os.getpid(), signal.{name}), os.read(os.pipe()[0], 1))")
        run_script(after, *arguments(videos, tmp_path / name, "--steps 1"), check=status)
        assert tensors(tmp_path / name / "last.pt")["step"] == 1

def kill_until_done(command, seconds, rng, kills):
    """Run a command, SIGKILL it at a random moment, run it again, and so on. -> number of kills"""
    for killed in range(kills + 1):
        process = subprocess.Popen([sys.executable, *command], cwd=HERE, start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(rng.uniform(*seconds) if killed < kills else 120) == 0
            return killed
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    raise AssertionError("120 s were not enough")

def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(videos, tmp_path):
    rng, total = random.Random(0), 0
    train.main(arguments(videos, tmp_path / "whole", "--steps 60 --save-every 60"))
    for run in range(20 if LONG else 1):
        out = tmp_path / f"run{run}"
        command = arguments(videos, out, "--steps 60 --save-every 1 --workers", run % 3)
        total += kill_until_done(["train.py", *command], (3, 6), rng, kills=5 if LONG else 1)
        assert_same_run(tmp_path / "whole", out)
        assert [row["step"] for row in rows_of(out / "log.jsonl")] == list(range(1, 61))
    print(f"{run + 1} runs, {total} kills")
    assert total > 0

def test_torchrun_starts_a_killed_rank_again(videos, two_processes, tmp_path, script):
    """The second process kills itself once; torchrun --max-restarts brings both back. Without it
    the other one ends with one line."""
    dying = script("""def check(row, scaler, clips, args):
    if row["step"] == 4 and args.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
train.check_finite = check""")
    command = arguments(videos, tmp_path / "run", "--steps", 8, "--accum", 2)
    result = torchrun("--max-restarts=0", dying, *command, check=1)
    assert "another process of this run has ended" in result.stderr
    assert "File \"" not in result.stderr.split("error: another process")[0]
    shutil.rmtree(tmp_path / "run")
    torchrun("--max-restarts=3", dying, *command)
    assert_same_run(two_processes, tmp_path / "run")

@pytest.mark.parametrize("other", ["in Python", pytest.param("awaits a device", marks=long_only)])
def test_an_error_on_one_rank_ends_all_and_stands_last_on_the_screen(other, videos, tmp_path,
                                                                     script):
    """A process that waits for a device runs no signal handler: torchrun kills it after 30 s."""
    wait = """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    signal.pause()"""
    failing = script(f"""plan = train.plan
def fail(args, *more):
    plan(args, *more)
    if args.rank == 1:
        raise ArithmeticError("the reason on rank 1"){wait if other != "in Python" else ""}
train.plan = fail""")
    result = torchrun(failing, *arguments(videos, tmp_path / "out", "--steps", 50), check=1,
                      timeout=60)
    assert "the reason on rank 1" in result.stderr[result.stderr.index("Root Cause"):]

def test_processes_without_a_gpu_are_an_error_unless_asked_for(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = arguments(videos, tmp_path / "out", "--steps 1 --device auto")
    result = torchrun(HERE / "train.py", *command, check=1, timeout=60)
    assert "sees no GPU for torchrun's 2 processes" in result.stderr
    alone = run_script(HERE / "train.py", *command)  # there it is a choice that is told
    assert "0 GPUs and" in alone.stdout and not re.search(r"[\r\x1b]", alone.stdout + alone.stderr)

def test_where_there_is_no_terminal_a_line_a_minute_tells_the_progress(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    show = train.progress(argparse.Namespace(rank=0, steps=9), 0, contextlib.ExitStack())
    for step in range(1, 10):
        now[0] += 25
        show(dict(step=step, loss=step, lr=0.1, clips_per_s=8.0, data_wait=0.25))
    said = capsys.readouterr()
    assert said.err == "" and said.out.splitlines() == [
        f"step {step} of 9: loss {(step + 1) / 2:.4f} lr 1.00e-01 clips/s 8.0 wait 25%"
        for step in (3, 6, 9)]

def test_a_save_that_takes_long_is_told(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 11.0, 20.0, 29.0])
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    args = argparse.Namespace(out=str(tmp_path), keep=1, size=(2, 3))
    for told in ("saving took 11 s; torchrun kills 30 s after SIGTERM\n", ""):
        train.save_run(args, dict(model=torch.nn.Linear(2, 1)), dict(step=3))
        assert capsys.readouterr().out == told
    assert json.loads((tmp_path / "args.json").read_text())["size"] == [2, 3]
    assert train.read_checkpoint(tmp_path / "last.pt")["step"] == 3

@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_data_worker_that_dies_or_hangs_ends_the_run(how, videos, tmp_path, script):
    action = "os.kill(os.getpid(), signal.SIGKILL)" if how == "dies" else "signal.pause()"
    odd = script(f"""read, main = train.read_clips, os.getpid()
def odd(path, clips, size):
    if path.endswith("3.mp4") and os.getpid() != main:
        {action}
    return read(path, clips, size)
train.read_clips = odd""")
    command = arguments(videos, tmp_path / "out", "--steps", 20, "--workers", 2,
                        "--data-timeout", 5)
    last = run_script(odd, *command, check=1, timeout=60).stderr.splitlines()[-1]
    assert "error: the data workers gave no batch, reading " in last and ".mp4" in last
    assert how == "dies" or "3.mp4" in last  # a death can show while another's batch is awaited

def test_a_dead_worker_or_a_deleted_folder_is_no_full_disk(videos, tmp_path, monkeypatch):
    def torchs_handler(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")
    command = arguments(videos, tmp_path / "run", "--steps 4")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torchs_handler)
        assert_refused("gave no batch.*DataLoader worker .* is killed", train.main, command)
    assert not list((tmp_path / "run").glob("*last*"))
    monkeypatch.setattr(train, "check_finite", lambda *args: shutil.rmtree(tmp_path / "run"))
    assert_refused("^(?!.*untouched).*No such file", train.main, [*command, "--save-every", "1"])

def test_torch_imported_first_is_told_where_it_may_cost_time(videos, tmp_path):
    environment = "import os; os.environ.pop('OMP_WAIT_POLICY', None); "
    command = arguments(videos, tmp_path, "--steps", 1)
    for first, told in (("import torch; ", True), ("", False)):
        said = run_script("-c", f"{environment}{first}import train; train.main({command})").stdout
        assert ("OMP_WAIT_POLICY" in said) == told

@needs_gpu
def test_on_a_gpu_the_default_run_learns_and_a_resumed_run_is_the_same_run(videos, tmp_path):
    def run(out, more):  # of two --device flags the last one holds
        train.main(arguments(videos, tmp_path / out, "--device cuda", more))
    run("default", "--steps 30")  # compiled, in bf16
    losses = losses_of(tmp_path / "default")
    assert len(losses) == 30 and np.mean(losses[-5:]) < np.mean(losses[:5])
    exact = "--steps 4 --no-compile --amp off"
    run("whole", exact)
    run("parts", exact)
    (tmp_path / "parts" / "last-1.pt").replace(tmp_path / "parts" / "last.pt")  # back to step 2
    run("parts", exact)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", tolerance=1e-5)

# ---------------------------------------------------------------------------- released checkpoints

def layer(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

def block_shapes(prefix, dim, depth, apart):
    """Shapes of transformer blocks as the releases name them; q, k and v apart or in one."""
    shapes = {}
    for start in (f"{prefix}{i}." for i in range(depth)):
        shapes |= layer(start + "norm1", dim) | layer(start + "norm2", dim)
        shapes |= layer(start + "mlp.fc1", 4 * dim, dim) | layer(start + "mlp.fc2", dim, 4 * dim)
        shapes |= layer(start + "attn.proj", dim, dim)
        for name, rows in dict(q=dim, k=dim, v=dim).items() if apart else [("qkv", 3 * dim)]:
            shapes |= layer(f"{start}attn.{name}", rows, dim)
    return shapes

def released(code, apart=True, head=None, dim=128, width=64):
    """A checkpoint in the layout of the paper's code ("paper") or of mae_st, for 4 x 32 x 32 pixels
    in patches of 2 x 16 x 16, with random weights."""
    torch.manual_seed(0)
    tables = dict(cls_token=1, pos_embed_class=1, pos_embed_spatial=4, pos_embed_temporal=2)
    shapes = {name: (1, rows, dim) for name, rows in tables.items()} | layer("norm", dim)
    shapes |= layer("patch_embed.proj", dim, 3, 2, 16, 16)
    shapes |= block_shapes("blocks.", dim, 2, apart)
    paper = "pred_head.transforms.0."
    if head:
        shapes |= layer("head.projection" if code == "paper" else "head", head, dim)
    else:
        shapes |= layer("decoder_embed", width, dim) | dict(mask_token=(1, 1, width))
    if not head and code == "paper":
        shapes |= block_shapes(paper, width, 4, apart) | layer(paper + "4", width)
        shapes |= layer("pred_head.projections.0", 768, width)
        shapes |= dict(decoder_pos_embed=(1, 9, width))
    elif not head:
        shapes |= block_shapes("decoder_blocks.", width, 4, apart) | layer("decoder_norm", width)
        shapes |= layer("decoder_pred", 768, width)
        shapes |= {f"decoder_{name}": (1, rows, width) for name, rows in tables.items()}
    weights = {name: torch.randn(shape) * (0.02 if "patch" in name else 0.1)
               for name, shape in shapes.items()}
    if code == "paper":
        return dict(model_state=weights, cfg="text", epoch=1)
    return dict(model=weights, args=argparse.Namespace(lr=1e-3), epoch=1)

def plain_released_encoder(weights, video, keep):
    """One clip (3, T, H, W), normalised -> class token and tokens in keep, before the last norm."""
    x = F.conv3d(video[None], weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"],
                 stride=(2, 16, 16))[0].flatten(1).T  # (N, D)
    times, places = weights["pos_embed_temporal"][0], weights["pos_embed_spatial"][0]
    x = x + (times[:, None] + places).flatten(0, 1)
    x = torch.cat([weights["cls_token"][0] + weights["pos_embed_class"][0], x[keep]])
    return plain_blocks(x, weights, "blocks.", 2, 2)

def plain_released_pooled(weights, video):
    return norm_of(plain_released_encoder(weights, video, range(8))[1:].mean(0), weights, "norm")

@pytest.mark.parametrize("apart", [True, False])
def test_a_released_checkpoint_reconstructs_as_its_tensors_say(apart, videos, tmp_path):
    path, weights = tmp_path / "released.pyth", released("paper", apart)["model_state"]
    torch.save(released("paper", apart), path)
    content = train.load_init(path)
    model = train.build(MaskedAutoencoder, content["model_args"], content["model"], path)
    video, noise = torch.randn(1, 3, 4, 32, 32), torch.rand(1, 2, 2, 2)
    keep, hide = random_masking(noise, (2, 2, 2), 0.7)
    latent = norm_of(plain_released_encoder(weights, video[0], keep[0]), weights, "norm")
    full = weights["mask_token"][0].repeat(9, 1)
    full[[0, *(1 + keep[0]).tolist()]] = linear_of(latent, weights, "decoder_embed")
    full = full + weights["decoder_pos_embed"][0]
    full = plain_blocks(full, weights, "pred_head.transforms.0.", 4, 1)
    full = norm_of(full, weights, "pred_head.transforms.0.4")
    expected = linear_of(full, weights, "pred_head.projections.0")[1 + hide[0]]
    latent = model.encoder.norm(model.encoder(patchify(video, (2, 16, 16)), keep))
    assert_close(model.decode(latent, keep, hide)[0], expected, 1e-4, "prediction")
    show_it(videos, path, tmp_path / "show")
    assert (tmp_path / "show" / "reconstruction.png").exists()

def finetune_arguments(*words):
    args, content = finetune.parse_arguments(list(map(str, words)))
    train.setup(args)
    return args, content

@pytest.mark.parametrize("code, head", [("paper", "head.projection"), ("mae_st", "head")])
@pytest.mark.parametrize("apart", [True, False])
def test_a_released_classifier_scores_as_computed_from_its_tensors(code, head, apart, tmp_path):
    torch.save(released(code, apart, head=5), tmp_path / "released.pyth")
    args, content = finetune_arguments("--eval", "--val=x", "--init", tmp_path / "released.pyth")
    video = torch.randn(1, 3, 4, 32, 32)
    model, classes = finetune.trained_classifier(args, content)
    weights = next(x for x in released(code, apart, head=5).values() if isinstance(x, dict))
    expected = linear_of(plain_released_pooled(weights, video[0]), weights, head)
    assert_close(model(video)[0], expected, 1e-4, code)
    assert classes == ["0", "1", "2", "3", "4"]
    model = mae_st.Classifier(**content["model_args"])  # with nothing but mae_st.py
    model.load_state_dict(content["model"])
    assert_close(model.eval()(video)[0], expected, 1e-4, code)

def test_of_mae_sts_pretrained_checkpoint_the_encoder_is_taken(videos, tmp_path, capsys):
    path, video = tmp_path / "released.pth", torch.randn(1, 3, 4, 32, 32)
    torch.save(released("mae_st"), path)
    content = train.load_init(path)
    model = mae_st.Classifier(**content["model_args"], classes=3)
    finetune.take_weights(model, content, path, True)
    out = capsys.readouterr().out
    assert "a new head; left out: decoder_blocks, decoder_cls_token, decoder_embed" in out
    expected = plain_released_pooled(released("mae_st")["model"], video[0])
    assert_close(model.pooled(video)[0], expected, 1e-4, "pooled")
    assert_refused("decoder", show_it, videos, path, tmp_path / "show")

@pytest.mark.parametrize("name", ["blocks.1.attn.proj.weight", "blocks.0.attn.k.bias",
                                  "blocks.1.mlp.fc2.bias", "norm.weight", "pos_embed_class",
                                  "patch_embed.proj.bias", "patch_embed.proj.weight",
                                  "pos_embed_temporal"])
@pytest.mark.parametrize("change", ["another name", "another shape", "one more"])
def test_a_tensor_that_is_not_as_expected_is_an_error_that_names_it(name, change, tmp_path):
    content, path = released("paper"), tmp_path / "released.pyth"
    weights = content["model_state"]
    if change == "another name":
        weights[name + "x"] = weights.pop(name)
    elif change == "another shape":
        weights[name] = torch.cat([weights[name]] * 2, dim=-1)
    else:
        weights["surprise." + name] = weights[name]
    torch.save(content, path)
    def load():
        args, loaded = finetune_arguments("--data", "x", "--init", path, "--size", 32)
        finetune.take_weights(finetune.make_classifier(args, loaded, 3)[1], loaded, path, True)
    ours = mae_st.our_name(name)
    names = map(re.escape, (name, ours, ours.replace(".k.", ".qkv.")))
    assert_refused("|".join(names), load)

@pytest.mark.parametrize("content, problem", [
    ({"model": 3}, "no tensors"), ({"model_state": {"epoch": 3}}, "no tensors"),
    ({"weights": {}}, "no tensors"), ({"model": {3: torch.zeros(1)}}, "no tensors"),
    ({"model": {"a": torch.tensor([1, math.inf])}}, "a holds numbers that are not finite"),
    ({"model": {"patch_embed.proj.weight": torch.zeros(8, 1, 2, 16, 16)}}, "is not .D, 3, u, p, p"),
    ({"model": {"patch_embed.proj.weight": torch.zeros(8, 3, 2, 16, 8)}}, "is not .D, 3, u, p, p")])
def test_a_file_without_weights_of_ours_or_of_the_codes_says_what_is_missing(content, problem):
    with pytest.raises(ValueError, match=problem):
        mae_st.from_released(content)

def test_positions_are_interpolated_linearly_in_time_and_bicubically_in_space():
    torch.manual_seed(0)
    time, space = "encoder.pos_embed_temporal", "encoder.pos_embed_spatial"
    table = {time: torch.randn(4, 3), space: torch.randn(15, 3)}
    other = mae_st.interpolate_pos_embed(table, (4, 3, 5), (6, 3, 5))
    at = (np.arange(6) + 0.5) * 4 / 6 - 0.5  # centres of the new slices, counted in old ones
    for d in range(3):
        expected = np.interp(at, np.arange(4), table[time][:, d]).astype(np.float32)
        assert_close(other[time][:, d], expected, 1e-6, "time")
    assert torch.equal(other[space], table[space])
    grid = table[space].view(3, 5, 3)
    other = mae_st.interpolate_pos_embed(table, (4, 3, 5), (4, 6, 4))[space].view(6, 4, 3)
    def weight(x):  # the cubic kernel with a = -0.75
        x = abs(x)
        near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        return near if x <= 1 else far if x < 2 else 0.0
    for i, j in np.ndindex(6, 4):
        y, x = (i + 0.5) * 3 / 6 - 0.5, (j + 0.5) * 5 / 4 - 0.5
        expected = sum(weight(y - a) * weight(x - b) * grid[min(max(a, 0), 2), min(max(b, 0), 4)]
                       for a in range(-2, 6) for b in range(-2, 8))
        assert_close(other[i, j], expected, 1e-5, f"place {i}, {j}")

# ------------------------------------------------------------------------- parts of the fine-tuning

def test_the_classifier_is_a_linear_layer_on_the_norm_of_the_mean_patch_token():
    torch.manual_seed(0)
    model = mae_st.Classifier(classes=7, dropout=0.5, **ENCODER).eval()
    torch.nn.init.normal_(model.head.weight)
    video, w = torch.randint(0, 256, (2, 3, 4, 12, 20), dtype=torch.uint8), model.state_dict()
    for tokens, scores in zip(model.encoder(model.encoder.patchify(video)), model(video)):
        pooled = norm_of(tokens[1:].mean(0), w, "encoder.norm")
        assert_close(scores, linear_of(pooled, w, "head"), 1e-5, "scores")
    probe = mae_st.Classifier(classes=7, batch_norm=True, **ENCODER)
    probe.load_state_dict(w, strict=False)
    x = probe.pooled(video)
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
    assert_close(probe(video), linear_of(x, w, "head"), 1e-4, "probe")

@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.0, 0.0)])
def test_mixed_targets_are_in_the_proportion_of_what_is_seen(mixup, cutmix):
    shares, colours, targets = [], torch.tensor([-1.0, 0.5, 2.0]), torch.eye(4)[:3]
    partner = colours.flip(0)
    for seed in range(200):
        video = colours[:, None, None, None, None].expand(3, 3, 2, 10, 14).clone()
        mixed, result = finetune.mix(video, targets, np.random.default_rng(seed), mixup, cutmix)
        share = float((mixed[0, 0, 0].mean() - partner[0]) / (colours[0] - partner[0]))
        shares.append(share)
        seen = share * colours + (1 - share) * partner
        assert_close(mixed.mean((1, 2, 3, 4)), seen, 1e-4, "mean colours")
        assert_close(result, share * targets + (1 - share) * targets.flip(0), 1e-4, "targets")
        assert torch.equal(mixed, mixed[:, :1, :1].expand_as(mixed)), "frames alike"
        assert mixup or mixed[0].unique().numel() <= 2
    if mixup or cutmix:
        assert 0.4 < np.mean(shares) < (0.75 if cutmix else 0.6)
        assert min(shares) < 0.1 and max(shares) > 0.9
    else:
        assert_close(shares, np.ones(200), 1e-5, "nothing is mixed")

def plain_operation(name, x, m):
    """An operation of RandAugment on one clip (3, T, H, W) of whole numbers, pixel by pixel."""
    C, T, H, W = x.shape
    level, factor, out = abs(m), max(0.1, 1 + 0.9 * m), np.zeros(x.shape)
    grey = 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]
    my, mx, angle = (H - 1) / 2, (W - 1) / 2, math.radians(30 * m)
    cos, sin = math.cos(angle), math.sin(angle)
    source = {"rotate": lambda i, j: (mx + cos * (j - mx) + sin * (i - my),
                                      my - sin * (j - mx) + cos * (i - my)),
              "shear_x": lambda i, j: (j + 0.3 * m * (i + 0.5), i),
              "shear_y": lambda i, j: (j, i + 0.3 * m * (j + 0.5)),
              "translate_x": lambda i, j: (j + 0.45 * m * W, i),
              "translate_y": lambda i, j: (j, i + 0.45 * m * H)}.get(name)
    def pixel(c, t, i, j):
        return float(x[c, t, i, j]) if 0 <= i < H and 0 <= j < W else 128.0
    def cubic(d):  # Keys's kernel with a = -0.75, as in torch
        return 1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
    for c, t, i, j in np.ndindex(x.shape):
        v = float(x[c, t, i, j])
        if source:
            sx, sy = source(i, j)
            top, left = math.floor(sy), math.floor(sx)
            v = sum(cubic(abs(sy - a)) * cubic(abs(sx - b)) * pixel(c, t, a, b)
                    for a in range(top - 1, top + 3) for b in range(left - 1, left + 3))
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
            base = {"color": grey[t, i, j], "contrast": round(float(grey.mean())), "brightness": 0}
            v = base[name] + factor * (v - base[name])
        out[c, t, i, j] = min(max(v, 0), 255)
    return out

def test_in_a_batch_each_clip_gets_what_was_drawn_for_it():
    rng = np.random.default_rng(0)
    names = [*finetune.OPERATIONS, None]
    drawn = [[(names[i], rng.uniform(-1, 1)) if names[i] else None
              for i in rng.integers(len(names), size=2)] for _ in range(40)]
    video = torch.from_numpy(rng.integers(0, 256, (40, 3, 2, 9, 12), dtype=np.uint8))
    alone = [video[b:b + 1].clone() for b in range(40)]
    for clip, operations in zip(alone, drawn):
        finetune.rand_augment(clip, [operations])
    finetune.rand_augment(video, drawn)
    assert_close(video.double(), torch.cat(alone).double(), 1, "of 255, clips")

@pytest.mark.parametrize("name", finetune.OPERATIONS)
def test_each_operation_of_randaugment_equals_a_plain_loop_and_is_the_same_in_every_frame(name):
    rng = np.random.default_rng(0)
    for m in (0.7, -0.55):
        video = torch.from_numpy(rng.integers(20, 230, (4, 3, 2, 9, 12), dtype=np.uint8))
        video[1] = video[1, :, :1]  # a still clip stays still
        before = video.clone()
        drawn = [[(name, m), None], [None, (name, m)], [None, None], [(name, -m), None]]
        finetune.rand_augment(video, drawn)  # in the first layer with two magnitudes
        for b, own in ((0, m), (1, m), (3, -m)):
            # to whole numbers, of 255, and what floor(110 m) of a float32 is
            own = float(torch.tensor(own))
            expected = plain_operation(name, before[b].numpy().astype(int), own)
            assert_close(video[b].double(), expected, 1, f"{name} {own}")
        assert torch.equal(video[1, :, 0], video[1, :, 1]) and torch.equal(video[2], before[2])

def test_randaugment_draws_every_operation_half_of_the_time_with_the_magnitude_asked_for():
    drawn = [operation for seed in range(3000)
             for operation in finetune.draw_operations(np.random.default_rng(seed), 7)]
    applied = [operation for operation in drawn if operation]
    assert abs(len(applied) / len(drawn) - 0.5) < 0.03
    counts = Counter(name for name, _ in applied)
    assert len(counts) == 15 and min(counts.values()) > 0.7 * len(applied) / 15
    m = np.array([m for _, m in applied])
    assert_close([abs(m).mean(), abs(m).std(), (m > 0).mean()], [0.7, 0.05, 0.5], 0.03, "m")

def test_holes_are_noise_of_the_right_size_the_same_in_every_frame():
    holes = [finetune.draw_hole(np.random.default_rng(s), 0.25, 40, 60) for s in range(2000)]
    assert abs(sum(hole is not None for hole in holes) / 2000 - 0.25) < 0.04
    holes = [finetune.draw_hole(np.random.default_rng(s), 1, 400, 600) for s in range(2000)]
    top, bottom, left, right = np.array(holes).T
    h, w = bottom - top, right - left
    for numbers, low, high, margin in (
            (h * w / 240_000, 0.02, 1 / 3, 0.01), (np.log(h / w), -1.2, 1.2, 0.1),  # log 0.3
            (top, 0, 400, 100), (left, 0, 600, 150), (bottom, 0, 400, 100), (right, 0, 600, 150)):
        assert low - 0.02 <= numbers.min() < low + margin, numbers.min()
        assert high - margin < numbers.max() <= high + 0.02, numbers.max()
    video = torch.zeros(2, 3, 4, 40, 60)
    finetune.erase(video, [None, (10, 30, 20, 50)])
    hole = video[1, :, :, 10:30, 20:50]
    assert (video[0] == 0).all() and (video[1] != 0).sum() == (hole != 0).sum() == 3 * 4 * 20 * 30
    assert torch.equal(hole, hole[:, :1].expand_as(hole)) and abs(hole[:, 0].std() - 1) < 0.1

def view_of(i, j, views, sampling="clip", frames=16, size=(224, 224)):
    args = argparse.Namespace(frames=frames, stride=4, size=size, sampling=sampling)
    return finetune.View(i, j, views, args)

def test_views_lie_where_the_formula_says():
    for K, S in ((7, 3), (1, 1), (2, 1), (5, 2)):
        for i, frames in itertools.product(range(K), (300, 61, 30, 100)):
            room = max(0, frames - 1 - 60)  # 16 frames at 30 a second, stride 4: the last is 60 on
            start = i * math.floor(room / (K - 1)) if K > 1 else room // 2
            times = view_of(i, 0, (K, S)).times(np.arange(frames) / 30)
            assert_close(times * 30, start + 4 * np.arange(16), 1e-9, f"clip {i} of {K}")
        for j, (width, height, H, W) in itertools.product(range(S), (
                (340, 256, 224, 224), (256, 340, 224, 224), (224, 224, 224, 224),
                (320, 240, 96, 160))):
            (x, y, w, h), flip = view_of(0, j, (K, S), size=(H, W)).box(width, height)
            assert not flip and max(w, h) == 1
            assert w * width / (h * height) == pytest.approx(W / H)
            place = j / (S - 1) if S > 1 else 0.5
            assert (x, y) == pytest.approx(((1 - w) * place, (1 - h) * place))

def test_segments_give_one_frame_of_each_equal_part():
    seconds = np.arange(40) / 8 + np.sin(np.arange(40)) / 20  # uneven; five to each of eight parts
    drawn = [finetune.SegmentClip(np.random.default_rng(seed), 8, 4, (0.5, 1), False).times(seconds)
             for seed in range(200)]
    for i in range(8):
        assert {times[i] for times in drawn} == set(seconds[5 * i:5 * i + 5]), f"part {i}"
    for k in range(5):
        times = view_of(k, 1, (5, 3), "segments", frames=8).times(seconds)
        assert_close(times, seconds[k::5], 1e-9, f"view {k} of 5")

def test_accuracy_counts_an_unreadable_video_as_wrong():
    scores = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [np.nan] * 3, [0.2, 0.5, 0.3]], np.float32)
    assert finetune.ranks(scores, [0, 1, 0, 2])[[0, 1, 3]].tolist() == [0, 2, 1]
    row = finetune.accuracy(scores, [0, 1, 0, 2], (1, 1))
    assert row == dict(views="1x1", val_acc1=25.0, val_acc5=75.0, videos=4)

def test_labels_are_the_folders_names_or_the_lists_numbers_or_names():
    assert finetune.class_names(["cat", "a dog", "cat"], "list.txt") == ["a dog", "cat"]
    assert finetune.class_names(["10", "2", "2"], "list.txt") == [str(i) for i in range(11)]
    numbers = finetune.label_numbers(["1", "00", "2"], ["0", "1", "2"], "list.txt")
    assert numbers.tolist() == [1, 0, 2]

def test_without_val_a_tenth_is_held_out_by_its_path_alone(tmp_path):
    def held_out(count):
        for i in range(count):
            (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
            (tmp_path / "ab"[i % 2] / f"{i}.mp4").touch()
        data = finetune.find_data(argparse.Namespace(data=str(tmp_path), val=None, per_class=None))
        train_paths, val_paths = set(data.train.tolist()), set(data.val.tolist())
        assert len(train_paths) + len(val_paths) == count and not train_paths & val_paths
        return val_paths
    few, many = held_out(100), held_out(300)
    assert few <= many and 15 < len(many) < 50

# From the paper code's configs k400_VIT_{B,L,H}_16x4_MAE_PT and _FT: for all sizes, or B, L, H.
# Rates are per node and BATCH_SIZE there, and end rates per node: 512 or 256 videos are 16 nodes.
OFFICIAL = (
    ("train", "lr", "BASE_LR 1e-4, BATCH_SIZE 64, 32, 32", (1e-4 * 8, 1e-4 * 16, 1e-4 * 16)),
    ("train", "first", "WARMUP_START_LR 1e-6", (1e-6 * 8, 1e-6 * 16, 1e-6 * 16)),
    ("train", "last", "COSINE_END_LR 1e-6", (1e-6 * 8, 1e-6 * 16, 1e-6 * 16)),
    ("train", "epochs", "MAX_EPOCH", (200, 200, 400)),
    ("train", "warmup", "WARMUP_EPOCHS 60, 30, 60", (60 / 200, 30 / 200, 60 / 400)),
    ("train", "repeat", "TRAIN_CROP_NUM_TEMPORAL", 4),
    ("train", "mask_ratio", "MASK_RATIO", 0.9),
    ("train", "clip", "CLIP_GRAD_L2NORM", 0.02),
    ("train", "weight_decay", "WEIGHT_DECAY", 0.05),
    ("train", "frames", "NUM_FRAMES", 16),
    ("train", "stride", "SAMPLING_RATE", 4),
    ("train", "size", "TRAIN_CROP_SIZE", (224, 224)),
    ("train", "patch", "PATCH_KERNEL", (2, 16, 16)),
    ("train", "decode_ratio", "the paper", 1.0),
    ("finetune", "lr", "BASE_LR, BATCH_SIZE 16, B 1", (6e-4 * 16, 3e-4 * 16, 3e-4 * 16)),
    ("finetune", "first", "WARMUP_START_LR 1e-8", 1e-8 * 16),
    ("finetune", "last", "COSINE_END_LR", (1e-5 * 16, 1e-5 * 16, 1e-6 * 16)),
    ("finetune", "epochs", "MAX_EPOCH", (75, 50, 75)),
    ("finetune", "warmup", "WARMUP_EPOCHS 5", (5 / 75, 5 / 50, 5 / 75)),
    ("finetune", "repeat", "AUG.NUM_SAMPLE", (2, 2, 1)),
    ("finetune", "layer_decay", "LAYER_DECAY", (0.65, 0.75, 0.8)),
    ("finetune", "drop_path", "DROPPATH_RATE", (0.1, 0.2, 0.2)),
    ("finetune", "dropout", "DROPOUT_RATE", (0.3, 0.3, 0.5)),
    ("finetune", "clip", "CLIP_GRAD_L2NORM", 5.0),
    ("finetune", "weight_decay", "WEIGHT_DECAY", 0.05),
    ("finetune", "mixup", "MIXUP.ALPHA", 0.8),
    ("finetune", "cutmix", "CUTMIX_ALPHA", 1.0),
    ("finetune", "smoothing", "LABEL_SMOOTH_VALUE", 0.1),
    ("finetune", "rand_augment", "AA_TYPE rand-m7-mstd0.5-inc1", 7.0),
    ("finetune", "erase", "RE_PROB", 0.25),
    ("finetune", "crop", "TRAIN_JITTER_SCALES_RELATIVE", 0.08),
    ("finetune", "views", "the paper's test", (7, 3)),
)

@pytest.mark.parametrize("script, key, config, official", OFFICIAL)
def test_the_recipe_of_each_size_has_the_official_numbers(script, key, config, official, tmp_path):
    for i, size in enumerate(("base", "large", "huge")):
        if script == "train":
            args = train.parse_arguments(["--data", "x", "--model", size])
        else:
            shape = dict(frames=16, height=224, width=224, patch=(2, 16, 16))
            content = dict(model={}, model_args=mae_st.SIZES[size] | shape)
            torch.save(content, tmp_path / "last.pt")
            args, _ = finetune.parse_arguments(["--data=x", f"--init={tmp_path}/last.pt"])
        ours = vars(args) | dict(zip(("first", "last"), (end * args.lr for end in args.lr_ends)))
        wanted = official[i] if isinstance(official, tuple) and len(official) == 3 and (
            key != "patch") else official
        assert ours[key] == pytest.approx(wanted), (size, config)

def test_flags_win_over_the_recipe_and_a_checkpoint_over_the_size(tmp_path, monkeypatch, capsys):
    args, _ = finetune.parse_arguments(["--data", "videos", "--scratch"])
    assert (args.layer_decay, args.model, args.drop_path) == (1, "large", 0.2)
    args = vars(train.parse_arguments(["--model", "tiny", "--data", "x", "--lr", "3"]))
    demo = vars(train.parse_arguments([]))
    assert [key for key in args if args[key] != demo[key]] == ["data", "lr"] and args["lr"] == 3
    assert train.parse_arguments(["--epochs", "200"]).steps is None
    with pytest.raises(SystemExit):
        train.main("--help --data x --model base".split())
    assert "per 512 videos a step; begins and ends at 1 % (default: 0.0008)" in " ".join(
        capsys.readouterr().out.split())

# ----------------------------------------------------------------------------- fine-tuning, as run

@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A folder with train/ and val/, three classes each, 15 and 7 videos, and a pre-training."""
    folder = tmp_path_factory.mktemp("labelled")
    for part, count in (("train", 5), ("val", 3)):
        for name in ("left", "right", "up"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count if (part, name) != ("val", "up") else 1):
                frames = train.moving_scene(np.random.default_rng([i, count]), name, 16, 32)
                train.write_video(folder / part / name / f"{i}.mp4", frames, 30)
    train.main(arguments(folder / "train", folder / "pretrain", "--steps", 4, "--save-every", 4))
    return folder

def tuning(folder, out, *more):
    """With the recipe of ViT-B."""
    return (f"--data {folder}/train --val {folder}/val --init {folder}/pretrain/last.pt "
            f"--out {out} --device cpu --batch-size 2 --views 2x3 --repeat 2 --layer-decay 0.65 "
            "--drop-path 0.1 --dropout 0.3 --mixup 0.8 --cutmix 1 --smoothing 0.1 --erase 0.25 "
            f"--rand-augment 7 --crop 0.08 {' '.join(map(str, more))}").split()

def test_fine_tuning_resumed_is_the_same_run_with_all_of_its_randomness(labelled, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = "--steps 4 --save-every 2 --drop-path 0.2 --lr 0.5 --workers"
    finetune.main(tuning(labelled, whole, more, 1))
    end_during(3, finetune.main, tuning(labelled, parts, more, 0))
    for _ in range(2):  # the second time it is finished, says the same again, and adds nothing
        finetune.main(tuning(labelled, parts, more, 0))
    assert_same_run(whole, parts)
    a, b = (train.read_checkpoint(run / "last.pt") for run in (whole, parts))
    assert a["best"] == b["best"] and a["classes"] == ["left", "right", "up"]
    assert rows_of(whole / "predictions.jsonl") == rows_of(parts / "predictions.jsonl")
    a, b = ([{key: x for key, x in row.items() if key not in ("clips_per_s", "data_wait")}
             for row in rows_of(run / "log.jsonl")] for run in (whole, parts))
    assert a == b and [row["step"] for row in a if "loss" in row] == [1, 2, 3, 4]
    assert [(row["step"], row["views"]) for row in a if "val_acc1" in row] == [
        (2, "1x1"), (4, "1x1"), (4, "2x3")]
    assert_refused("mixup 0.8 -> 0.0", finetune.main, tuning(labelled, whole, more, "0 --mixup 0"))
    assert_refused("micro_batch", finetune.main,
                   tuning(labelled, whole, more, "0 --batch-size 1 --accum 2"))
    shares = [0, *((1 + math.cos(math.pi * (step - 0.4) / 3.6)) / 2 for step in (1, 2, 3))]
    assert_close([row["lr"] for row in a if "loss" in row],
                 [0.5 * 2 / 256 * (0.01 + 0.99 * share) for share in shares], 1e-9, "rates")

NOTHING = "--mixup 0 --cutmix 0 --drop-path 0 --dropout 0 --erase 0 --workers 0 --lr 0.5"

def test_fine_tuning_is_nothing_but_a_plain_loop_where_nothing_is_drawn(labelled, tmp_path):
    finetune.main(tuning(labelled, tmp_path, NOTHING, "--rand-augment 0 --steps 4 --accum 2",
                         "--warmup 0.5 --clip 0.1"))
    before = train.read_checkpoint(labelled / "pretrain" / "last.pt")["model"]
    torch.manual_seed(0)
    model = mae_st.Classifier(classes=3, dim=128, depth=2, heads=4, frames=4, height=16, width=16,
                              patch=(2, 8, 8), positions="waves")
    model.encoder.load_state_dict({name.removeprefix("encoder."): x for name, x in before.items()
                                   if name.startswith("encoder.")})
    _, labels = train.list_videos(labelled / "train")
    clips = make_clips(labelled / "train", seed=0, area=(0.08, 1), noise=None,
                       labels=[["left", "right", "up"].index(label) for label in labels],
                       one_time=True)
    rates = [0.5 * 4 / 256 * (0.01 + 0.99 * share) for share in (0, 0.5, 1, 0.5)]
    depth = {"encoder.blocks.0": 1, "encoder.blocks.1": 2, "encoder.norm.": 3, "head.": 3}
    def scale_of(name):
        return 0.65 ** (3 - next((at for start, at in depth.items() if name.startswith(start)), 0))
    def loss_of(video, label):
        targets = F.one_hot(label, 3) * 0.9 + 0.1 / 3
        return -(model(video).log_softmax(1) * targets).sum(1).mean()
    steps = plain_steps(model, loss_of, scale_of, rates, plain_batches(clips, "label"),
                        (0.9, 0.999), 0.1)
    assert_run_is(tmp_path, model, steps)

def test_other_labels_or_other_weights_behind_the_same_names_are_another_run(labelled, tmp_path):
    paths, labels = train.list_videos(labelled / "train")
    weights = train.read_checkpoint(labelled / "pretrain" / "last.pt")
    def run(labels):
        lines = [f"{os.fsdecode(path)},{label}\n" for path, label in zip(paths, labels)]
        (tmp_path / "list.csv").write_text("".join(lines))
        torch.save(weights, tmp_path / "init.pt")
        finetune.main(tuning(labelled, tmp_path / "run", "--steps 1 --workers 0 --data",
                             tmp_path / "list.csv", "--init", tmp_path / "init.pt"))
    run(labels)
    other = [labels[-1], *labels[1:]]
    assert_refused(r"arguments: checksum_of_labels [0-9]+ -> [0-9]+\. Use", run, other)
    weights["model"]["encoder.pos_embed_temporal"] += 1
    assert_refused(r"arguments: checksum_of_weights [0-9]+ -> [0-9]+\. Use", run, labels)

def test_evaluation_is_the_same_on_one_and_two_processes(labelled, tmp_path, monkeypatch):
    """7 videos in groups of 2: the last group is short, and process 1 gets one group less."""
    finetune.main(tuning(labelled, tmp_path / "run", "--steps 2 --lr 0.5 --workers 0"))
    command = ["finetune.py", "--eval", *tuning(labelled, tmp_path / "one")[2:], "--init",
               tmp_path / "run" / "last.pt", "--views", "8x2", "--workers", "0", "--out"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it
    one, two = run_script(*command, tmp_path / "one"), torchrun(*command, tmp_path / "two")
    rows = rows_of(tmp_path / "one" / "predictions.jsonl")
    assert rows == rows_of(tmp_path / "two" / "predictions.jsonl")
    paths, _ = train.list_videos(labelled / "val")
    assert [row["video"] for row in rows] == [os.fsdecode(path) for path in paths]
    words = [re.search(r"top-1 .* of 7 videos", result.stdout).group() for result in (one, two)]
    assert words[0] == words[1]

def test_two_processes_fine_tune_as_one_does_where_nothing_is_drawn_per_process(labelled, tmp_path):
    more = NOTHING + " --steps 3"
    run_script("finetune.py", *tuning(labelled, tmp_path / "one", more, "--batch-size 4"))
    torchrun("finetune.py", *tuning(labelled, tmp_path / "two", more))
    assert_same_run(tmp_path / "one", tmp_path / "two", tolerance=5e-4)

def test_the_probe_is_a_linear_model_on_the_exported_features(labelled, tmp_path):
    finetune.main(tuning(labelled, tmp_path / "probe", "--probe --steps 30 --batch-size 8 "
                         "--views 1x1 --save-every 30"))
    weights = train.read_checkpoint(tmp_path / "probe" / "last.pt")["model"]
    before = train.read_checkpoint(labelled / "pretrain" / "last.pt")["model"]
    assert all(torch.equal(weights[name], before[name]) for name in weights if "encoder." in name)
    finetune.main(tuning(labelled, "none", "--views 1x1 --features", tmp_path / "features"))
    stored = np.load(tmp_path / "features")
    val, classes = stored["part"] == "val", stored["classes"].tolist()
    assert val.sum() == 7 and (~val).sum() == 15 and classes == ["left", "right", "up"]
    for path, label in zip(stored["paths"], stored["labels"]):
        assert Path(path).parent.name == classes[label]
    x = torch.from_numpy(stored["features"][val]) - weights["head_norm.running_mean"]
    x = x / (weights["head_norm.running_var"] + 1e-6).sqrt()
    scores = linear_of(x, weights, "head").softmax(1)
    rows = rows_of(tmp_path / "probe" / "predictions.jsonl")
    for row, path, prediction in zip(scores, stored["paths"][val], rows, strict=True):
        assert prediction["video"] == path
        assert_close([prediction["top5"][name] for name in classes], row, 1e-4, path)

def test_a_classifier_predicts_and_is_trained_on(labelled, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finetune.main(tuning(labelled, "runs/finetune", "--steps 2 --size 24x32 --frames 6 "
                         "--sampling segments --no-flip --amp bf16"))
    out = capsys.readouterr().out
    assert "positions interpolated from (2, 2, 2) to (3, 3, 4) patches, a new head; left out" in out
    finetune.main(["--predict", f"{labelled}/val/up/0.mp4", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()[-3:]
    shares = [float(line.split("%")[0]) for line in lines]
    assert {line.split()[-1] for line in lines} == {"left", "right", "up"}
    assert shares == sorted(shares, reverse=True) and abs(sum(shares) - 100) < 0.2
    finetune.main(tuning(labelled, "more", "--steps 1 --init runs/finetune/best.pt"))
    assert "a new head" not in capsys.readouterr().out
    finetune.main(tuning(labelled, "scratch", "--scratch --steps 1"))
    assert "from scratch" in capsys.readouterr().out
    assert_refused("gone.mp4 cannot be read", finetune.main,
                   ["--predict", "gone.mp4", "--device", "cpu"])
    finetune.main(["--eval", "--val", f"{labelled}/val", "--per-class", "1", "--device", "cpu"])

def test_wrong_input_of_fine_tuning_is_one_line(labelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    left, right = f"{labelled}/train/left/0.mp4", f"{labelled}/train/right/0.mp4"
    for name, labels in (("two", "01"), ("more", "02"), ("words", ("0", "one")),
                         ("halves", ("0.5", "1")), ("bare", ("", ""))):
        Path(f"{name}.txt").write_text(f"{left} {labels[0]}\n{right} {labels[1]}\n")
    torch.save(dict(model={}), "strange.pt")
    cases = [("--data two.txt --val more.txt", "class '2' is none of the 2"),
             ("--data words.txt", "'one' is no whole number"),
             ("--data halves.txt", "'0.5' is no whole number"), ("--data bare.txt", "no label"),
             ("--val bare.txt", "no label"), ("--val empty", "no video in it"),
             ("--views 2x3x4", "not 2 numbers"), ("--views ax3", "invalid size value"),
             ("--views 0x3", "from 1 to"), ("--model base", "--model base.*has tiny"),
             ("--patch 2x4x4", "--patch.*leave the flag out"), ("--size 20", "height 20"),
             ("--init strange.pt", "patch_embed"), ("--init gone.pt", "gone.pt"),
             ("--eval", "has no head"), ("--predict x.mp4", "has no head"),
             ("--features gone/f.npz", "--features gone/f.npz cannot be written"),
             ("--features empty", "cannot be written"), ("--mixup -1", "not from"),
             ("--layer-decay 2", "not from"), ("--val=", "--val: it is empty"),
             ("--probe --repeat 1 --batch-size 1", "--batch-size 2 or more")]
    cases = [(tuning(labelled, "out", "--steps 2 --workers 0", change), words)
             for change, words in cases]
    cases += [(f"--device cpu {command}".split(), words) for command, words in (
        ("--data two.txt", "no checkpoint: .* --scratch"),
        ("--features f.npz --val two.txt", "with --init"),
        (f"--predict {left}", "runs/finetune/last.pt is no file"),
        (f"--data {labelled}/val --init {labelled}/pretrain/last.pt", "give --val"))]
    for command, words in cases:
        assert_refused(words, finetune.main, command)

def test_unreadable_validation_videos_are_named_and_count_as_wrong(labelled, tmp_path, capsys):
    shutil.copytree(labelled / "val", tmp_path / "val")
    (tmp_path / "val" / "left" / "0.mp4").write_bytes(b"nothing")
    finetune.main([*tuning(labelled, tmp_path / "run", "--steps", 1), "--val", f"{tmp_path}/val"])
    assert f"cannot be read: {tmp_path}/val/left/0.mp4: no video" in capsys.readouterr().out
    rows = rows_of(tmp_path / "run" / "predictions.jsonl")
    assert rows[0]["top5"] == {} and rows[0]["rank"] >= 5 and len(rows) == 7

def test_fine_tuning_stops_at_nan_and_goes_on_after_a_signal(labelled, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = "--steps 6 --save-every 4 --workers 0"
    finetune.main(tuning(labelled, whole, more))
    forward, calls = mae_st.Classifier.forward, iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(mae_st.Classifier, "forward", lambda self, video: forward(self, video) * (
            math.nan if next(calls) == 2 else 1))
        assert_refused("step 3 are not", finetune.main, tuning(labelled, tmp_path / "nan", more))
    update, calls = train.update, iter(range(100))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(train, "update", lambda *args: (
            next(calls) == 2 and os.kill(os.getpid(), signal.SIGTERM), update(*args))[1])
        finetune.main(tuning(labelled, parts, more))
    assert ended.value.code == 128 + signal.SIGTERM
    assert train.read_checkpoint(parts / "last.pt")["step"] == 3
    assert not (parts / "best.pt").exists()  # a signal does not wait for validation
    finetune.main(tuning(labelled, parts, more))
    assert_same_run(whole, parts)
    a, b = (train.read_checkpoint(run / "last.pt")["best"] for run in (whole, parts))
    assert a == b

# ------------------------------------------------------------------------------------ the benchmark

BENCH = ("--model tiny --frames 4 --size 16 --patch 2x8x8 --batch-size 2 --rounds 1 --stride 2 "
         "--device cpu").split()

def bench_run(*words):
    args = bench.parse_arguments([*BENCH, *words])
    train.setup(args)
    run = bench.make_run(args)
    return run, [bench.make_row(run, line) for line in bench.arithmetic(run.model, args)]

def test_the_arithmetic_gives_table_1_of_the_paper_within_a_percent():
    args = bench.parse_arguments("--flops --model large --ratios 0.9".split())
    dense, sparse = bench.arithmetic(bench.make_model(args, "meta"), args)
    assert abs(dense["gmacs_as_paper"] / 627.5 - 1) < 0.01
    assert abs(sparse["gmacs_as_paper"] / 81.0 - 1) < 0.01
    assert abs(sparse["gmacs"] / 79.5 - 1) < 0.01
    assert (sparse["visible_tokens"], dense["visible_tokens"]) == (156, 1568)

@pytest.mark.parametrize("strategy, decode_ratio", [
    ("agnostic", 1.0), ("tube", 1.0), ("frame", 1.0), ("agnostic", 0.5)])
def test_multiply_adds_are_those_that_torch_counts(strategy, decode_ratio):
    args = bench.parse_arguments(f"--model tiny --frames 8 --size 24x40 --patch 2x8x8 --strategy "
                                 f"{strategy} --decode-ratio {decode_ratio}".split())
    model, video = bench.make_model(args, "cpu"), bench.random_video(2, args, "cpu")
    noise = mask_noise(strategy, 2, model.encoder.grid)
    for row in bench.arithmetic(model, args):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            if row["dense"]:
                model.dense(video, row["mask_ratio"], noise)
            else:
                model(video, row["mask_ratio"], noise, decode_ratio)
        counted = counter.get_total_flops() / 2 / 2 / 1e9  # two clips; two operations each
        assert_close(row["gmacs"], counted, 1e-12, f"{row['name']}, {strategy}")

def test_the_dense_baseline_is_an_encoder_over_all_tokens_with_a_learned_one_for_the_hidden():
    torch.manual_seed(0)
    model, noise, losses = randomise(bench.WithDense(**SMALL).double()), torch.rand(2, *GRID), []
    encoder, w = model.encoder, dict(model.named_parameters())
    patches = patchify(torch.randn(2, 3, 4, 12, 20, dtype=torch.float64), (2, 4, 4))
    _, ids_mask = random_masking(noise, encoder.grid, 0.7)
    for b in range(2):  # tokens in their natural order, clip by clip
        hidden = torch.zeros(30, dtype=torch.bool).index_fill(0, ids_mask[b], True)
        x = torch.where(hidden[:, None], model.encoder_mask_token, encoder.patch_embed(patches[b]))
        x = torch.cat([encoder.cls_token + encoder.pos_embed_class, x + encoder.pos_embed()])
        x = norm_of(plain_blocks(x, w, "encoder.blocks.", 2, 3), w, "encoder.norm")
        x = linear_of(x, w, "decoder_embed") + model.decoder_pos_embed
        x = norm_of(plain_blocks(x, w, "decoder_blocks.", 2, 2), w, "decoder_norm")
        target, _ = model.targets(patches[b:b + 1], hidden.nonzero().T)
        losses.append(F.mse_loss(linear_of(x[1:][hidden], w, "decoder_pred"), target[0]))
    video = unpatchify(patches, (2, 4, 4), GRID)
    assert_close(model.dense(video, 0.7, noise), torch.stack(losses).mean(), 1e-10, "loss")

def test_running_out_of_memory_halves_the_batch_and_says_so(monkeypatch, capsys):
    run, (row, *_) = bench_run("--batch-size", "8")
    def step(run, row):
        if row.videos > allowed:
            raise torch.OutOfMemoryError
    monkeypatch.setattr(bench, "step", step)
    monkeypatch.setattr(bench, "timed", lambda work, *_: work() or 1.0)
    allowed = 3
    bench.warm_up(run, row)
    assert row.videos == 2 and capsys.readouterr().out.count("the batch is halved") == 2
    allowed = 0
    assert_refused("out of memory at one video", bench.warm_up, run, row)

def test_the_straightforward_reading_gives_the_same_clips(videos, tmp_path, capsys):
    for path in videos.iterdir():
        clips = [[train.RandomClip(np.random.default_rng(i), 4, 2) for i in range(8)]
                 for _ in range(2)]
        ours = torch.from_numpy(train.read_clips(str(path), clips[0], (32, 32))).float().mean(-1)
        other = bench.read_straightforwardly(str(path), clips[1], (32, 32)).mean(2)  # brightness
        same, different = ((ours - x).abs().mean() for x in (other, other.roll(1, dims=0)))
        assert 2 * same < different, f"difference {same:.2f}, between other clips {different:.2f}"
    bench.main([*BENCH, "--loader", str(videos), "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    for row in rows:
        ratio = row["clips_per_s"] / row["straightforward_clips_per_s"]
        assert row["ratio"] == pytest.approx(ratio)
    assert len(rows) == 7 and capsys.readouterr().out.count("\n|") == 2 + 7

def test_bench_prints_a_table_and_draws_a_chart(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "LEAST", 0)
    bench.main([*BENCH, "--end-to-end", str(videos), "--workers", "1", "--ratios", "0.5",
                "0.75", "--json", str(tmp_path / "rows.json"), "--chart", str(tmp_path / "c.svg")])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    dense, *rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(table) == 2 + 3 and len({line.count("|") for line in table}) == 1
    assert dense["dense"] and [row["mask_ratio"] for row in rows] == [0.5, 0.75]
    assert [row["visible_tokens"] for row in rows] == [4, 2]
    for row in [dense, *rows]:
        assert row["clips"] == 8 and 0 <= row["data_wait"] <= 1 and row["peak_mem_gb"] is None
        for key, other in (("speedup", "clips_per_s"),
                           ("load_compute_speedup", "load_compute_clips_per_s")):
            assert row[key] == pytest.approx(row[other] / dense[other])
    drawn = ElementTree.parse(tmp_path / "c.svg").iter("{http://www.w3.org/2000/svg}circle")
    assert len(list(drawn)) == 3 * 2  # predicted, compute, load + compute at two ratios

def test_the_findings_are_means_over_seeds_and_the_chart_has_a_line_for_each_ratio(
        tmp_path, capsys):
    runs = [("0.9", 1, 5, 60, 20), ("0.9", 1, 10, 60, 30), ("0.9", 2, 10, 180, 50),
            ("0.9-time", 1, 10, 30, 10), ("scratch", 1, 10, 0, 12.5)]
    (tmp_path / "runs.jsonl").write_text("\n".join(
        json.dumps(dict(run=run, seed=seed, per_class=n, seconds=seconds, end=dict(val_acc1=top1)))
        for run, seed, n, seconds, top1 in runs))
    command = [f"--findings={tmp_path}/runs.jsonl", f"--chart={tmp_path}/chart.svg"]
    bench.main(command)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| run | minutes | 5 labels | 10 labels |", "| --- | --: | --: | --: |",
        "| `0.9` | 1.7 | 20.0 (20.0-20.0) | 40.0 (30.0-50.0) |",
        "| `0.9-time` | 0.5 |  | 10.0 (10.0-10.0) |", "| `scratch` | 0.0 |  | 12.5 (12.5-12.5) |"]
    (line,) = ElementTree.parse(tmp_path / "chart.svg").iter("{http://www.w3.org/2000/svg}polyline")
    (x, y), end = (tuple(map(float, point.split(","))) for point in line.get("points").split())
    assert (x, end[0]) == (60, 480) and (320 - end[1]) == pytest.approx(4 * (320 - y), abs=0.5)
    for lines, words in (("[1]", "--findings"), (json.dumps(
            dict(run="mine", per_class=3, seconds=1, end=dict(val_acc1=2))), "no run is named")):
        (tmp_path / "runs.jsonl").write_text(lines)
        assert_refused(words, bench.main, command)

def test_steps_of_the_benchmark_are_those_of_training():
    run, rows = bench_run(*"--size 32 --decoder-width 32 --decoder-depth 2 --ratios 0.75".split())
    model = run.model
    assert len(model.decoder_blocks) == 2 and model.decoder_pos_embed.shape[1] == 32
    for row, loss_of in zip(rows, (model.dense, model.forward), strict=True):
        begin = {name: x.clone() for name, x in model.state_dict().items()}
        batches = [(bench.random_video(clips, run.args, "cpu"),
                    mask_noise("agnostic", clips, (2, 4, 4))) for clips in (6, 1, 3)]
        loss = lambda video, noise: loss_of(video, row.line["mask_ratio"], noise)
        plain = plain_steps(model, loss, lambda name: 1, [1e-4] * 3, batches, (0.9, 0.95), 0.02)
        norms = [norm for _, norm in plain]
        assert min(norms) > 0.02 and max(norms) > 1.1 * min(norms), "clipping makes no difference"
        expected = {name: x.clone() for name, x in model.state_dict().items()}
        model.load_state_dict(begin)
        model.zero_grad()
        run.optimizer.state.clear()
        for batch in batches:
            bench.step(run, row, *batch)
        for name, parameter in model.named_parameters():
            assert_close(parameter, expected[name], 1e-6, name)
            assert parameter.grad is None

def test_the_tables_figures_follow_from_the_clock(videos, monkeypatch):
    """On a clock of its own: a dense step takes 0.2 s, a sparse one 0.05 s, a matrix product
    0.01 s, a batch 0.1 s to come."""
    now, (run, rows) = [0.0], bench_run("--rounds", "3", "--ratios", "0.75", "--repeat", "2")
    def pass_by(seconds, result=None):
        now[0] += seconds
        return result
    monkeypatch.setattr(bench, "mark", lambda device: now[0])
    monkeypatch.setattr(bench, "step", lambda run, row, *_: pass_by(
        0.2 if row.line["dense"] else 0.05))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", lambda a, b: pass_by(0.01, a))
        product = bench.measure(run, rows)
    assert product == pytest.approx(2 * 2048**3 / 0.01 / 1e12)
    collate = train.collate
    monkeypatch.setattr(train, "collate", lambda items: pass_by(0.1, collate(items)))
    monkeypatch.setattr(bench, "LEAST", 1)
    run.args.workers = 0
    for line, row, step in zip(bench.results(run, rows, product), rows, (0.2, 0.05)):
        wanted = dict(clips=4, step_ms=step * 1e3, step_ms_min=step * 1e3, step_ms_max=step * 1e3,
                      clips_per_s=4 / step, speedup=0.2 / step, gmacs=line["gmacs_encoder"]
                      + line["gmacs_decoder"], tflops=6 * line["gmacs"] * 4 / step / 1e3,
                      measured_over_predicted=0.2 / step / line["predicted_speedup"],
                      share_of_product=line["tflops"] / product)
        assert {key: line[key] for key in wanted} == pytest.approx(wanted)
        rates = bench.with_loading(run, row, train.list_videos(videos)[0])
        assert rates == pytest.approx((4 / (0.1 + step), 0.1 / (0.1 + step)))

# --------------------------------------------------------------------------------------- the README

README = (HERE / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)

@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """A folder to run in, with so few generated videos that the commands take seconds."""
    train.generate_videos(f"{tmp_path}/data/moving_scenes", ALONE, per_class=3, held_out=1)
    monkeypatch.chdir(tmp_path)
    os.symlink("moving_scenes/val", "data/kinetics_like")
    os.symlink("data/moving_scenes/train", "my_videos")
    os.symlink("data/moving_scenes/val/up/0000.mp4", "clip.mp4")

TOY = {"bench": "--model tiny --size 32 --frames 4 --batch-size 2 --rounds 1 --device cpu".split()}
TOY["train"] = TOY["finetune"] = ("--steps 1 --workers 0 --device cpu --batch-size 2 --accum 1 "
                                  "--repeat 1").split()

def test_the_snippets_in_the_readme_run_and_give_the_shapes_they_say(small_demo):
    train.main(TOY["train"])
    model, use, own_data = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(use.splitlines()) <= 12 and len(own_data.splitlines()) <= 16
    names = {}
    exec(model, names)
    assert names["loss"].isfinite()
    exec(use, names)
    assert names["tokens"].shape == (1, 512, 128) and names["cls"].shape == (1, 128)
    assert names["filled"].shape == (1, 3, 8, 64, 64) and names["mask"].shape == (1, 8, 8, 8)
    exec(own_data, {})
    assert len(rows_of("runs/tensors/log.jsonl")) == 20

def commands_of(text):
    """What stands in blocks without a language, and in backquotes, and runs one of our scripts."""
    blocks = [line for language, block in FENCE.findall(text) if not language
              for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for command in [part.strip() for line in [*blocks, *spans] for part in line.split("&&")]:
        found = re.match(r"(?:python|torchrun(?: --\S+)*) (train|finetune|bench)\.py\b(.*)",
                         command)
        if found:
            yield found[1], found[2].split()

SCRIPTS = {"train": train, "finetune": finetune, "bench": bench}

def test_every_command_in_the_readme_is_one_that_its_script_takes(monkeypatch):
    shape = dict(frames=16, height=224, width=224, patch=(2, 16, 16))
    content = dict(model={}, model_args=mae_st.SIZES["large"] | shape)
    monkeypatch.setattr(finetune, "load_init", lambda path: content)
    commands = list(commands_of(README))
    for script, flag in (("train", "large"), ("train", "--check-data"), ("bench", "--loader"),
                         ("finetune", "my_videos"), ("train", "--reconstruct")):
        assert any(flag in given for name, given in commands if name == script), (script, flag)
    for script, given in commands:
        SCRIPTS[script].parse_arguments(given)

def test_the_commands_of_the_readme_run_at_toy_size(small_demo, monkeypatch):
    monkeypatch.setattr(bench, "LEAST", 0)
    blocks = [match[0] for match in FENCE.finditer(README) if not match[1]]
    commands = list(commands_of(re.sub("(?m)^torchrun.*\n", "", "\n".join(blocks))))
    assert Counter(script for script, _ in commands) == dict(train=5, finetune=2, bench=4)
    for script, given in commands:
        small = "--size 32 --frames 4".split() if script == "train" else []
        SCRIPTS[script].main([*given, *TOY[script], *small])

def test_the_loop_in_the_readme_starts_each_run_once(tmp_path):
    """With a stand-in for Python that notes the command and writes a log of four steps."""
    (loop,) = (block for language, block in FENCE.findall(README) if language == "bash")
    (tmp_path / "assets").mkdir()
    (tmp_path / "python").write_text(f"""#!/bin/bash
[ $1 = -c ] && exec {sys.executable} "$@"
echo "$@" >> calls
while [ $# -gt 0 ]; do [ $1 = --out ] && out=$2; shift; done
mkdir -p ${{out:=none}}
for step in 1 2 3 4; do echo '{{"clips_per_s": 16}}'; done > $out/log.jsonl""")
    (tmp_path / "python").chmod(0o755)
    for _ in range(2):
        subprocess.run(["bash", "-c", loop], cwd=tmp_path, check=True, env=os.environ | dict(
            seeds="7", PATH=f"{tmp_path}:{os.environ['PATH']}"))
    scripts, runs = (tmp_path / "calls").read_text(), rows_of(tmp_path / "assets/miniature.jsonl")
    assert Counter(re.findall(r"^\w+", scripts, re.M)) == dict(train=15, finetune=18, bench=2)
    assert len(runs) == 18 and {run["seed"] for run in runs} == {7}
    published = rows_of(HERE / "assets/miniature.jsonl")
    assert {(run["run"], run["per_class"]) for run in runs} == {
        (run["run"], run["per_class"]) for run in published}
    assert {run["seconds"] for run in runs if run["run"] != "scratch"} == {8.0}
    for command in re.findall(r"^train.py (.*)", scripts, re.M):
        train.parse_arguments(command.split())

def test_the_numbers_in_the_readme_stand_in_assets(tmp_path, capsys):
    assets = HERE / "assets"
    rows = {path.stem: json.loads(path.read_text()) for path in assets.glob("*.json")}
    assert bench.markdown(bench.ARITHMETIC | bench.AS_PAPER, rows["flops_large"]) in README
    for key in ("speedup", "predicted_speedup"):
        speedups = [row[key] for row in rows["base_cpu"][1:]]
        assert "{:.2f}x, {:.2f}x, {:.2f}x and {:.2f}x".format(*speedups) in README
    plain, fast = (np.median([row["clips_per_s"] for row in rows[name]])
                   for name in ("loader_cpu", "loader_transcoded_cpu"))
    ratio = np.median([row["ratio"] for row in rows["loader_cpu"]])
    assert f"reads {plain:.0f} clips/s" in README and f"it reads {fast:.0f} (`bench" in README
    assert f"which is {ratio:.2f}x as many as by decoding all frames" in README
    bench.main(["--findings", f"{assets}/miniature.jsonl", "--chart", f"{tmp_path}/chart.svg"])
    assert capsys.readouterr().out.split("\n\n")[1].strip() in README
    assert (tmp_path / "chart.svg").read_text() == (assets / "miniature.svg").read_text()
