"""The specification. Every test compares with a plain loop, a second route or an exact property, on tiny models and
videos that it makes itself. `pytest` runs it all in minutes on two CPU cores; `MAE_LONG=1 pytest` runs the large
numbers: thousands of clips, hundreds of damaged files, dozens of kills.
"""

import ast
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
    nodes = list(ast.walk(ast.parse((HERE / "mae_st.py").read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} == {"math", "torch"}


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


def encode(path, frames, codec="libx264", rate=30, options=None, pix_fmt="yuv420p", pts=None, before=None, aspect=None, rotation=0, color_range=None):
    """Write frames to a video file; pts in units of 1/1000 s, if given."""
    with av.open(str(path), "w") as container:
        others = before(container) if before else []
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
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
    "HEVC": ("a.mp4", "libx265", {"x265-params": "keyint=12:bframes=4:log-level=none", "preset": "fast"}, "yuv420p"),
    "HEVC, open groups, layers": ("a.mkv", "libx265", {"x265-params": "keyint=12:open-gop=1:temporal-layers=2:bframes=4:log-level=none", "preset": "fast"}, "yuv420p"),
    "VP9": ("a.webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "6", "auto-alt-ref": "1", "lag-in-frames": "10"}, "yuv420p"),
    "VP8": ("a.webm", "libvpx", {"g": "12", "deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "10"}, "yuv420p"),
    "AV1": ("a.mkv", "libsvtav1", {"g": "12", "preset": "10", "svtav1-params": "irefresh-type=1"}, "yuv420p"),
    "MPEG-4 in AVI": ("a.avi", "mpeg4", {"g": "12", "bf": "2", "b": "300k"}, "yuv420p"),
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
            assert np.array_equal(result, rendered([frames[i] for i in shown], (48, 64), clip.flip)), f"{name} from {start} s: other frames than {shown}"


def test_packets_that_nothing_depends_on_are_not_decoded(tmp_path):
    """The speed-up is real: for one late frame of H.264 with B-frames, far fewer frames are decoded than lie before it."""
    path = encode(tmp_path / "a.mp4", natural_frames(48), options=X264 | {"x264-params": "keyint=24:scenecut=0:bframes=3:b-adapt=0"})
    with train.open_video(path) as (container, stream):
        table = train.read_packets(container, stream)
        last = sorted(table.pts)[40]
        decoded = [frame.pts for frame in train.decode_needed(stream.codec_context, table, {last: None})]
    assert last in decoded and sorted(table.pts)[24] in decoded and min(decoded) >= sorted(table.pts)[24]
    assert len(decoded) <= 12, f"{len(decoded)} frames were decoded"


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
    frames = np.broadcast_to(colours[:, None, None], (6, 35, 51, 3)) if pix_fmt == "yuv444p" else np.broadcast_to(colours[:, None, None], (6, 36, 52, 3))
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
    path = encode(tmp_path / "a.mp4", natural_frames(6, 32, 48), before=before)
    alone = encode(tmp_path / "b.mp4", natural_frames(6, 32, 48))
    assert np.array_equal(*(train.read_clips(file, [FixedClip([0.1])], (32, 48)) for file in (path, alone)))


def test_random_crops_stay_within_area_and_aspect_and_starts_within_the_video():
    for seed in range(300):
        clip = train.RandomClip(np.random.default_rng(seed), 16, 4)
        (x, y, w, h), _ = clip.box(340, 256)
        assert 0 <= x and 0 <= y and x + w <= 1 + 1e-9 and y + h <= 1 + 1e-9
        assert 0.5 - 1e-9 <= w * h <= 1 and 3 / 4 - 1e-9 <= w * 340 / (h * 256) <= 4 / 3 + 1e-9
        times = clip.times(10.0)
        assert times[0] >= 0 and times[-1] <= 10 and np.allclose(np.diff(times), 4 / 30)


def bad_files(folder):
    """Files that are no videos, each with a word that must stand in the message."""
    good = encode(folder / "good.mp4", natural_frames(12, 32, 32))
    data = Path(good).read_bytes()
    (folder / "text.mp4").write_text("this is a text\n" * 100)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes(data[:len(data) // 2])
    (folder / "list.mp4").write_text(f"ffconcat version 1.0\nfile {good}\n")
    (folder / "m3u.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:{good}\n#EXT-X-ENDLIST\n")
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        for packet in silence(container):
            container.mux(packet)
    return ["text.mp4", "empty.mp4", "cut.mp4", "list.mp4", "m3u.mp4", "folder.mp4", "pipe.mp4", "sound.mp4", "missing.mp4"]


def test_files_that_are_no_videos_are_refused_with_a_reason(tmp_path):
    for name in bad_files(tmp_path):
        with pytest.raises(train.BadVideo) as caught:
            train.read_clips(str(tmp_path / name), [FixedClip([0])], (32, 32))
        assert str(caught.value).strip() and "\n" not in str(caught.value), name


def test_huge_frames_are_refused(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", natural_frames(2, 64, 64))
    monkeypatch.setattr(train, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(train.BadVideo, match="64 x 64"):
        train.read_clips(path, [FixedClip([0])], (32, 32))


def test_damaged_files_decode_or_are_reported(tmp_path):
    """Bits flipped, cut, zeroed, spliced: never a crash, a hang or a wrong shape."""
    rng = np.random.default_rng(0)
    sources = [Path(encode(tmp_path / f"{i}{file}", natural_frames(24, 48, 64), codec, options=options, pix_fmt=pix_fmt)).read_bytes()
               for i, (file, codec, options, pix_fmt) in enumerate(CODECS[name] for name in ("H.264, closed groups", "HEVC", "VP9", "AV1", "MPEG-4 in AVI", "MPEG-2"))]
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
             for name, (file, codec, options, _) in CODECS.items() if name in ("H.264, closed groups", "VP9", "MPEG-4 in AVI")] + [str(tmp_path / "bad.mp4")]
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
