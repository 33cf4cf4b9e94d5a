"""Fine-tune a pre-trained encoder for classification: the paper's Kinetics recipe, and evaluation.

    python finetune.py                                                 no data: the generated videos
    python finetune.py --data my_videos --init runs/pretrain/last.pt   one sub-folder a class
    torchrun --nproc_per_node=8 finetune.py --data train.csv --val val.csv --init pretrained.pyth
    python finetune.py --eval --val val.csv --init runs/finetune/last.pt
    python finetune.py --predict clip.mp4
"""
import argparse
import inspect
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

from train import RECIPE as PRETRAINING  # before torch: it sets OMP_WAIT_POLICY
from train import (DTYPES, BadVideo, InputError, RandomClip, VideoClips, between, build, collate,
                   data_errors, first_look, fit, generate_videos, identity, in_a_line, list_videos,
                   load_init, loader, log_line, of_all_processes, plan, read_clips, rng_of,
                   run_script, setup, shared_flags, sizes, text, whole_file)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from mae_st import (SIZES, Classifier, Encoder, grid_size, interpolate_pos_embed, normalise,
                    param_groups)

AUGMENT, MIX, FEW = 10, 11, 12  # uses of `rng_of`; train.py has 0 to 2

# -------------------------------------------------------------------------------- clips and views

def frames_at(places, seconds):
    """When the frames at these places begin: shares of the video (T,), 0 to 1 -> seconds (T,)."""
    return seconds[(places * len(seconds)).astype(int)]

class SegmentClip(RandomClip):
    """One random frame from each of T equal parts of the video, for Something-Something."""

    def __init__(self, rng, frames, stride, area, flip):
        super().__init__(rng, frames, stride, area, flip)
        self.places = (np.arange(frames) + rng.random(frames)) / frames  # (T,)

    def times(self, seconds):
        return frames_at(self.places, seconds)

class View:
    """Clip i of K in time and crop j of S in space, for evaluation. See `read_clips`."""

    def __init__(self, i, j, views, args):
        self.i, self.j, (self.K, self.S), self.args = i, j, views, args

    def times(self, seconds):
        """(T,). Clip i starts at frame i * floor((frames - span) / (K - 1)), each 1/30 s."""
        offsets = np.arange(self.args.frames)
        if self.args.sampling == "segments":
            return frames_at((offsets + (self.i + 0.5) / self.K) / len(offsets), seconds)
        offsets = offsets * self.args.stride / 30  # s
        room = max(0.0, seconds[-1] - offsets[-1]) * 30 + 1e-6  # frames; whole numbers stay whole
        start = math.floor(room / 2) if self.K == 1 else self.i * math.floor(room / (self.K - 1))
        return start / 30 + offsets

    def box(self, width, height):
        """The largest crop of our shape; S of them lie side by side along the longer side."""
        H, W = self.args.size
        w, h = min(1, height * W / H / width), min(1, width * H / W / height)
        place = self.j / (self.S - 1) if self.S > 1 else 0.5
        return ((1 - w) * place, (1 - h) * place, w, h), False

class VideoViews(Dataset):
    """views[i]: all views of video i from one decode; zeros, and good=False, if unreadable."""

    def __init__(self, paths, views, args):
        self.paths, self.size = paths, (args.frames, *args.size, 3)
        self.views = [View(i, j, views, args) for i in range(views[0]) for j in range(views[1])]

    def name(self, i):
        return os.fsdecode(self.paths[i])

    def __getitem__(self, i):
        try:
            video, bad = read_clips(self.name(i), self.views, self.size[1:3]), []
        except BadVideo as reason:
            bad = [f"{self.name(i)}: {reason}"]
            video = np.zeros((len(self.views), *self.size), np.uint8)
        return dict(video=torch.from_numpy(video), bad=bad, good=torch.tensor([not bad]))

# --------------------------------------------------------------------- augmentation on the device

# RandAugment (arXiv 1909.13719), operations and ranges of "rand-m7-mstd0.5-inc1": larger m changes
# more. Each takes pixels x (n, 3, T, H, W), float 0..255, and m (n, 1, 1, 1, 1) in [-1, 1], or |m|
# where a direction has no meaning. All frames of a clip change in the same way.

GREY = 128  # comes in where a picture is moved away
PIXELS = (2, 3, 4)  # the dimensions T, H, W

def blend(x, other, m):
    """Away from `other` for m > 0, towards it for m < 0."""
    return other + (x - other) * (1 + 0.9 * m)

def luma(x):  # (n, 1, T, H, W)
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]

def auto_contrast(x, m):
    low, high = x.amin(PIXELS, keepdim=True), x.amax(PIXELS, keepdim=True)  # (n, 3, 1, 1, 1)
    return torch.where(high > low, (x - low) * 255 / (high - low), x)

def equalize(x, m):
    """Make all values about equally frequent, in integers, as Pillow does."""
    values = x.long().flatten(2)  # (n, 3, T * H * W)
    counts = values.new_zeros(*values.shape[:2], 256)  # (n, 3, 256)
    counts.scatter_add_(2, values, torch.ones_like(values))
    step = (values.shape[2] - counts.gather(2, values.amax(2, keepdim=True))) // 255  # (n, 3, 1)
    table = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)  # (n, 3, 256)
    new = torch.where(step > 0, table.clamp(max=255).gather(2, values), values)
    return new.view(x.shape).float()

def sharpness(x, m):
    n, C, T, H, W = x.shape
    kernel = x.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]).view(1, 1, 3, 3) / 13
    inner = F.conv2d(x.reshape(-1, 1, H, W), kernel).view(n, C, T, H - 2, W - 2)
    smooth = x.clone()  # the edge stays
    smooth[..., 1:-1, 1:-1] = inner
    return blend(x, smooth, m)

def affine(x, a, b, c, d, e, f):
    """Show at (x, y), pixels from the middle, what was at (a x + b y + c, d x + e y + f)."""
    n, C, T, H, W = x.shape
    theta = (a, b * (H / W), c * (2 / W), d * (W / H), e, f * (2 / H))  # half a side is 1
    theta = [v.flatten() if torch.is_tensor(v) else x.new_full((n,), v) for v in theta]
    theta = torch.stack(theta, 1).view(n, 2, 3)
    grid = F.affine_grid(theta, (n, C * T, H, W), align_corners=False)  # (n, H, W, 2)
    moved = F.grid_sample((x - GREY).flatten(1, 2), grid, "bicubic", align_corners=False)
    return moved.view(x.shape) + GREY

def rotate(x, m):
    angle = m * math.radians(30)
    return affine(x, angle.cos(), angle.sin(), 0, -angle.sin(), angle.cos(), 0)

OPERATIONS = {
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "invert": lambda x, m: 255 - x,
    "rotate": rotate,
    "posterize": lambda x, m: x - x % 2 ** (4 + (m.abs() * 4).floor()),  # 4 - floor(4 |m|) bits
    "solarize": lambda x, m: torch.where(x < 256 - (m.abs() * 256).floor(), x, 255 - x),
    "solarize_add": lambda x, m: torch.where(x < 128, x + (m.abs() * 110).floor(), x),
    "color": lambda x, m: blend(x, luma(x), m),
    "contrast": lambda x, m: blend(x, luma(x).mean(PIXELS, keepdim=True).round(), m),
    "brightness": lambda x, m: blend(x, 0, m),
    "sharpness": sharpness,
    "shear_x": lambda x, m: affine(x, 1, 0.3 * m, 0.15 * m * x.shape[3], 0, 1, 0),  # from the top
    "shear_y": lambda x, m: affine(x, 1, 0, 0, 0.3 * m, 1, 0.15 * m * x.shape[4]),  # from the left
    "translate_x": lambda x, m: affine(x, 1, 0, 0.45 * m * x.shape[4], 0, 1, 0),
    "translate_y": lambda x, m: affine(x, 1, 0, 0, 0, 1, 0.45 * m * x.shape[3]),
}

def draw_operations(rng, magnitude):
    """[(operation, m) or None] for one clip: two operations, each left out half of the time."""
    drawn = []
    for _ in range(2):
        name, applied = str(rng.choice(list(OPERATIONS))), rng.random() < 0.5
        m, sign = min(max(rng.normal(magnitude, 0.5), 0), 10) / 10, rng.choice([-1, 1])
        drawn.append((name, sign * m) if applied else None)
    return drawn

def rand_augment(video, drawn):
    """Apply drawn[b] of `draw_operations` to clip b of video (B, 3, T, H, W), uint8, in place."""
    for layer in zip(*drawn):
        for name in sorted({operation[0] for operation in layer if operation}):
            rows = [b for b, operation in enumerate(layer) if operation and operation[0] == name]
            m = torch.tensor([layer[b][1] for b in rows], dtype=torch.float32)
            m = m.to(video.device, non_blocking=True).view(-1, 1, 1, 1, 1)
            rows = torch.tensor(rows).to(video.device, non_blocking=True)  # a list would wait
            changed = OPERATIONS[name](video[rows].float(), m)
            video[rows] = changed.clamp(0, 255).round().byte()

def draw_hole(rng, chance, height, width):
    """Random erasing (arXiv 1708.04896): (top, bottom, left, right) of 2 to 33 %, or None."""
    for _ in range(10 if rng.random() < chance else 0):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return top, top + h, left, left + w

def erase(video, holes):
    """Fill holes of normalised video (B, 3, T, H, W), in place, with noise, alike in all frames."""
    for clip, hole in zip(video, holes):
        if hole:
            top, bottom, left, right = hole
            noise = torch.randn(3, 1, bottom - top, right - left, device=video.device)
            clip[:, :, top:bottom, left:right] = noise

def mix(video, targets, rng, mixup, cutmix):
    """Mix clip b of the batch with clip B - 1 - b: video (B, 3, T, H, W), targets (B, classes).
    mixup (arXiv 1710.09412) adds the two, cutmix (1905.04899) puts a box of one into the other;
    where both are asked for, even odds decide. Targets are mixed in the proportion that is seen."""
    if not mixup and not cutmix:
        return video, targets
    other = video.flip(0)
    if cutmix and (not mixup or rng.random() < 0.5):
        (H, W), side = video.shape[3:], math.sqrt(1 - rng.beta(cutmix, cutmix))
        y, x = rng.uniform(0, H), rng.uniform(0, W)  # the middle of the box, cut off at the border
        top, bottom = (round(min(max(y + sign * side * H / 2, 0), H)) for sign in (-1, 1))
        left, right = (round(min(max(x + sign * side * W / 2, 0), W)) for sign in (-1, 1))
        share = 1 - (bottom - top) * (right - left) / (H * W)
        video[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    else:
        share = rng.beta(mixup, mixup)
        video = other.lerp_(video, share)
    return video, targets.flip(0).lerp(targets, share)

@torch.no_grad()
def augment(batch, args, classes):
    """A batch of `VideoClips` -> clips (B, 3, T, H, W), normalised, and targets (B, classes). All
    that is drawn for a clip follows from its sample number, and for the batch from its first."""
    samples, video = batch["sample"], batch["video"]
    rng = rng_of(args.seed, MIX, samples[0])
    torch.manual_seed(int(rng.integers(2**62)))  # of erasing, drop path and dropout
    rngs = [rng_of(args.seed, AUGMENT, k, i % args.repeat) for i, k in enumerate(samples)]
    with torch.autocast(args.device, enabled=False):
        if args.rand_augment:
            rand_augment(video, [draw_operations(one, args.rand_augment) for one in rngs])
        video = normalise(video)
        erase(video, [draw_hole(one, args.erase, *args.size) for one in rngs])
        targets = F.one_hot(batch["label"], classes).float()
        return mix(video, targets, rng, args.mixup, args.cutmix)

# ----------------------------------------------------------------------------------------- labels

def labelled(where):
    """Paths and labels of a folder or list, all of them labelled."""
    paths, labels = list_videos(where)
    if labels is None or None in labels:
        path = os.fsdecode(paths[labels.index(None) if labels else 0])
        raise InputError(f"{where}: {path} has no label; give sub-folders, or 'path label' lines")
    return paths, labels

def class_names(labels, where):
    """Class names in order: folders; in a list names, or numbers from 0 to the largest one."""
    names = sorted(set(labels))
    if os.path.isdir(where) or not any(re.fullmatch(r"[-+]?\d*\.?\d+", name) for name in names):
        return names
    if wrong := [name for name in names if not name.isdecimal() or len(name) > 5]:
        raise InputError(f"{where}: label {wrong[0]!r} is no whole number from 0 to 99999, and "
                         "others are numbers; number all classes, or name them all")
    return [str(number) for number in range(1 + max(map(int, names)))]

def label_numbers(labels, classes, where):
    """The class of each video, as a number."""
    number = {name: i for i, name in enumerate(classes)}
    labels = [x if x in number or not re.fullmatch(r"\d{1,5}", x) else str(int(x)) for x in labels]
    if unknown := sorted(set(labels) - number.keys()):
        raise InputError(f"{where}: class {unknown[0]!r} is none of the {len(classes)} of training")
    return np.array([number[name] for name in labels])

def find_data(args, classes=None):
    """The labelled videos of --data and --val, as a namespace of classes, train, train_labels, val
    and val_labels. classes: those of a trained classifier; else they come from --data."""
    if not args.data and not args.val:
        raise InputError("no videos: give --data, --val or both")
    where, data = args.data or args.val, argparse.Namespace(train=[], train_labels=[])
    paths, labels = labelled(where)
    data.classes = classes or class_names(labels, where)
    numbers = label_numbers(labels, data.classes, where)
    data.val, data.val_labels = paths, numbers
    if args.data and args.val:
        data.train, data.train_labels = paths, numbers
        data.val, labels = labelled(args.val)
        data.val_labels = label_numbers(labels, data.classes, args.val)
    elif args.data:
        root = args.data if os.path.isdir(args.data) else os.path.dirname(args.data) or "."
        names = [os.path.relpath(path, os.fsencode(root)) for path in paths]
        out = np.array([zlib.crc32(name) % 10 == 0 for name in names])
        print(f"no --val: a hash of their paths holds out {out.sum()} of {len(paths)} videos")
        if out.all() or not out.any():
            raise InputError(f"--data {args.data}: too few videos to hold out a tenth, give --val")
        data.train, data.train_labels = paths[~out], numbers[~out]
        data.val, data.val_labels = paths[out], numbers[out]
    if args.per_class and args.data:
        taken, rows = Counter(), []
        for i in rng_of(args.seed, FEW).permutation(len(data.train)):
            taken[data.train_labels[i]] += 1
            rows += [i] * (taken[data.train_labels[i]] <= args.per_class)
        data.train, data.train_labels = data.train[sorted(rows)], data.train_labels[sorted(rows)]
    return data

# -------------------------------------------------------------------------------------- the model

def make_classifier(args, content, classes, batch_norm=False):
    """Arguments and model: the encoder of the checkpoint, or of the flags, at the flags' size."""
    given = content["model_args"] if content else SIZES[args.model] | dict(patch=args.patch)
    encoder = inspect.signature(Encoder).parameters
    model_args = {key: value for key, value in given.items() if key in encoder} | dict(
        frames=args.frames, height=args.size[0], width=args.size[1], classes=classes,
        dropout=args.dropout, drop_path=args.drop_path, batch_norm=batch_norm,
        checkpointing=args.checkpointing)
    return model_args, build(Classifier, model_args)

def take_weights(model, content, path, new_head):
    """Weights of a checkpoint into a classifier. Says what was interpolated, and what left out."""
    weights, before = content["model"], content["model_args"]
    grid = grid_size([before[key] for key in ("frames", "height", "width")], before["patch"])
    others = ("decoder_", "mask_token") + ("head",) * new_head
    left_out = [name for name in weights if name.startswith(others)]
    weights = {name: x for name, x in weights.items() if name not in left_out}
    words, here = [f"{len(weights)} tensors loaded"], model.encoder.grid
    if grid != here:
        weights = interpolate_pos_embed(weights, grid, here)
        words.append(f"positions interpolated from {grid} to {here} patches")
    if new_head:
        weights |= {name: x for name, x in model.state_dict().items() if name.startswith("head")}
        words.append("a new head")
    left_out = sorted({name.split(".")[0] for name in [*left_out, *content.get("left_out", [])]})
    with in_a_line(f"{path} does not fit this model", RuntimeError, KeyError):
        model.load_state_dict(weights)
    print(f"{path}: {', '.join(words)}; left out: {', '.join(left_out) or 'nothing'}")

def trained_classifier(args, content):
    """The classifier of a fine-tuned checkpoint and its class names, for evaluation."""
    if "head.weight" not in content["model"]:
        raise InputError(f"--init {args.init} has no head: it is pre-trained, not fine-tuned")
    classes = content.get("classes") or [str(i) for i in range(len(content["model"]["head.bias"]))]
    batch_norm = content["model_args"].get("batch_norm", False)
    _, model = make_classifier(args, content, len(classes), batch_norm)
    take_weights(model, content, args.init, new_head=False)
    return model.to(args.device).eval(), classes

# ------------------------------------------------------------------------------------- evaluation

def for_each_video(compute, paths, views, args):
    """compute(clips (B * V, 3, T, H, W)) -> (B * V, n); its mean over the V views of each video:
    (videos, n), NaN where unreadable, whatever the number of processes that share the work."""
    V, n, parts, group = views[0] * views[1], len(paths), [], []
    together = max(1, 32 // V)  # 32 clips in one forward pass
    groups = [list(range(first, min(first + together, n))) for first in range(0, n, together)]
    groups, dataset = groups[args.rank::args.world], VideoViews(paths, views, args)
    batches = iter(loader(dataset, args, batch_sampler=groups, collate_fn=collate))
    dtype = DTYPES[args.amp]
    with data_errors(lambda: map(dataset.name, group)), torch.inference_mode():
        for group in tqdm(groups, desc="evaluation", disable=args.rank > 0 or None, leave=False):
            batch = next(batches)
            clips, good = (batch[key].to(args.device) for key in ("video", "good"))
            with torch.autocast(args.device, dtype, enabled=dtype is not None):
                rows = compute(clips.permute(0, 4, 1, 2, 3))  # (B * V, n)
            rows = rows.float().unflatten(0, (-1, V)).mean(1)  # (B, n)
            parts.append((group, rows.masked_fill(~good[:, None], math.nan), batch["bad"]))
    parts = [(group, rows.cpu().numpy(), bad) for group, rows, bad in parts]
    parts = sorted(of_all_processes(parts, args), key=lambda part: part[0])
    for line in sum((bad for *_, bad in parts), []):
        print(f"cannot be read: {line}")
    return np.concatenate([rows for _, rows, _ in parts])  # (videos, n)

def score(model, paths, views, args):
    """Softmax scores (videos, classes), NaN where unreadable."""
    if args.world > 1:  # each process has its own running mean of the batch-norm
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()
    scores = for_each_video(lambda clips: model(clips).float().softmax(-1), paths, views, args)
    model.train()
    return scores

def ranks(scores, labels):
    """(n,) how many other classes score as high as the right one; last for an unreadable video."""
    right = np.take_along_axis(scores, np.asarray(labels)[:, None], 1)  # (n, 1)
    return np.where(np.isnan(right[:, 0]), scores.shape[1] + 5, (scores >= right).sum(1) - 1)

def accuracy(scores, labels, views, when=""):
    """A row for the log: top-1 and top-5 in per cent, and of how many videos and views."""
    rank = ranks(scores, labels)
    top1, top5 = (100 * float((rank < k).mean()) for k in (1, 5))
    views = f"{views[0]}x{views[1]}"
    tqdm.write(f"{when}top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(rank)} videos, {views} views "
               "each", sys.stdout)
    return dict(views=views, val_acc1=top1, val_acc5=top5, videos=len(rank))

def write_predictions(out, scores, data):
    """predictions.jsonl, one object a video: path, class, its rank (0 is right), the five best."""
    with whole_file(Path(out) / "predictions.jsonl") as path, open(path, "w") as file:
        for video, label, row, rank in zip(data.val, data.val_labels, scores,
                                           ranks(scores, data.val_labels)):
            best = [] if np.isnan(row[0]) else np.argsort(-row, kind="stable")[:5]
            top5 = {data.classes[c]: round(float(row[c]), 6) for c in best}
            file.write(json.dumps(dict(video=os.fsdecode(video), label=data.classes[label],
                                       rank=int(rank), top5=top5)) + "\n")

# ---------------------------------------------------------------------------------------- the run

def fine_tune(args, data, content):
    """Fine-tune, or train from scratch; returns top-1 at the end, in per cent."""
    torch.manual_seed(args.seed)
    if args.probe and args.batch_size * args.repeat == 1:
        raise InputError("--probe has a batch-norm: give --batch-size 2 or more")
    model_args, model = make_classifier(args, content, len(data.classes), batch_norm=args.probe)
    if content and not args.scratch:
        before = content.get("classes"), content["model_args"].get("batch_norm", False)
        take_weights(model, content, args.init, new_head=before != (data.classes, args.probe))
    model.to(args.device).encoder.requires_grad_(not args.probe)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    print(f"{args.model}: {trained:.3g} M parameters to train{' from scratch' * args.scratch}; "
          f"{len(data.classes)} classes, {len(data.train)} videos, {len(data.val)} to validate")
    plan(args, len(data.train), 256)
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay, args.layer_decay),
                                  lr=args.peak_lr, betas=(0.9, 0.999), fused=True)
    clips = VideoClips(data.train, seed=args.seed, repeat=args.repeat, frames=args.frames,
                       stride=args.stride, size=args.size, labels=data.train_labels, one_time=True,
                       area=(args.crop, 1.0), flip=args.flip, kind=KINDS[args.sampling])
    table = content["model"]["encoder.pos_embed_temporal"] if content else torch.zeros(0)
    keep = dict(identity=identity(args, data.train) | dict(classes=len(data.classes),
        checksum_of_labels=zlib.crc32(np.array(data.train_labels).tobytes()),
        micro_batch=[args.batch_size, args.accum, args.world],  # which is mixed as a whole
        checksum_of_weights=zlib.crc32(table.float().numpy().tobytes())),  # one table, for all
        model_args=model_args, classes=data.classes, best=dict(val_acc1=-1.0, step=0))

    def loss_of(model, batch):
        video, targets = augment(batch, args, len(data.classes))
        scores = model(video).float()
        return dict(loss=F.cross_entropy(scores, targets, label_smoothing=args.smoothing))

    def validate(step):
        if step % args.save_every and step < args.steps:  # a signal does not wait for it
            return None
        row = accuracy(score(model, data.val, (1, 1), args), data.val_labels, (1, 1))
        if row["val_acc1"] > keep["best"]["val_acc1"]:
            keep["best"] = dict(val_acc1=row["val_acc1"], step=step)
            if args.rank == 0:
                with whole_file(Path(args.out) / "best.pt") as path:
                    torch.save(keep | dict(model=model.state_dict()), path)
        return dict(step=step, **row)
    fit(args, model, optimizer, clips, loss_of, keep, at_save=validate)
    scores = score(model, data.val, args.views, args)
    row = accuracy(scores, data.val_labels, args.views, "at the end: ")
    if args.rank == 0:
        write_predictions(args.out, scores, data)
        with open(Path(args.out) / "log.jsonl", "a") as log:
            log.write(log_line(dict(step=args.steps, **row)))
    print(f"done: {args.out}/last.pt, best.pt (step {keep['best']['step']}), predictions.jsonl")
    return row["val_acc1"]

def train_and_compare(args, content):
    """Fine-tune; with --compare, train from scratch too."""
    data = find_data(args)
    if not len(data.train):
        raise InputError("nothing to train on: give --data")
    top1 = fine_tune(args, data, content)
    if args.compare:
        scratch = dict(scratch=True, layer_decay=1.0, out=f"{args.out}/scratch")
        other = fine_tune(argparse.Namespace(**vars(args) | scratch), data, content)
        print(f"top-1 of {len(data.val)} videos after {args.steps} steps on {len(data.train)} "
              f"labelled ones: {top1:.1f} % pre-trained, {other:.1f} % from scratch")

# --------------------------------------------------------------------------------- other commands

def evaluate(args, content):
    """--eval: the accuracy of a fine-tuned checkpoint, and predictions.jsonl."""
    model, classes = trained_classifier(args, content)
    data = find_data(args, classes)
    with in_a_line(f"--out {args.out} cannot be written", OSError):
        Path(args.out).mkdir(parents=True, exist_ok=True)
    scores = score(model, data.val, args.views, args)
    accuracy(scores, data.val_labels, args.views)
    if args.rank == 0:
        write_predictions(args.out, scores, data)

def predict(args, content):
    """--predict: the five likeliest classes of one video."""
    model, classes = trained_classifier(args, content)
    scores = score(model, [os.fsencode(args.predict)], args.views, args)[0]  # (classes,)
    if np.isnan(scores[0]):
        raise InputError(f"--predict {args.predict} cannot be read as a video, see above")
    for c in np.argsort(-scores, kind="stable")[:5]:
        print(f"{scores[c]:6.1%}  {classes[c]}")

def export_features(args, content):
    """--features: what the head sees of every video, the mean over the views; NaN if unreadable."""
    if not os.access(Path(args.features).parent, os.W_OK) or os.path.isdir(args.features):
        raise InputError(f"--features {args.features} cannot be written; give a file in a folder")
    data = find_data(args, content.get("classes"))
    _, model = make_classifier(args, content, len(data.classes))
    take_weights(model, content, args.init, new_head=True)
    paths = [*data.train, *data.val]
    features = for_each_video(model.to(args.device).eval().pooled, paths, args.views, args)
    if args.rank == 0:
        with whole_file(args.features) as path, open(path, "wb") as file:
            np.savez(file, features=features, labels=[*data.train_labels, *data.val_labels],
                     paths=np.array([os.fsdecode(path) for path in paths]), classes=data.classes,
                     part=np.repeat(["train", "val"], [len(data.train), len(data.val)]))
    print(f"{args.features}: features {features.shape} of all videos")

# ------------------------------------------------------------------------------------------ flags

KINDS = {"clip": RandomClip, "segments": SegmentClip}
PLAIN = dict(layer_decay=1.0, drop_path=0.0, dropout=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0,
             rand_augment=0.0, erase=0.0)
# By size: the paper code's configs k400_VIT_{B,L,H}_16x4_FT, whose rates are for a node's batch of
# 16 videos (that of B reads 1; 16 is our guess). lr_ends: first and last rate as shares of --lr.
RECIPE = {
    "huge": dict(lr=4.8e-3, lr_ends=(1e-8 / 3e-4, 1e-6 / 3e-4), warmup=5 / 75, epochs=75, repeat=1,
                 layer_decay=0.8, drop_path=0.2, dropout=0.5),
    "large": dict(lr=4.8e-3, lr_ends=(1e-8 / 3e-4, 1e-5 / 3e-4), warmup=5 / 50, epochs=50, repeat=2,
                  layer_decay=0.75, drop_path=0.2, dropout=0.3),
    "base": dict(lr=9.6e-3, lr_ends=(1e-8 / 6e-4, 1e-5 / 6e-4), warmup=5 / 75, epochs=75, repeat=2,
                 layer_decay=0.65, drop_path=0.1, dropout=0.3),
    "tiny": dict(lr=8e-3, warmup=0.1, steps=100, batch_size=32, repeat=1, crop=0.5, views=(1, 1),
                 **PLAIN),
}
RECIPE["small"] = RECIPE["base"]
PROBE = dict(lr=3.2e-2, lr_ends=(0.01, 0.01), weight_decay=0.0, **PLAIN)  # AdamW; MAE has LARS
DEMO = dict(per_class=10, flip=False, save_every=100)  # a mirrored motion is another class
SHAPE = dict(frames=16, size=(224, 224), patch=(2, 16, 16), stride=4.0, sampling="clip")

def make_parser():
    parser = shared_flags(__doc__, RECIPE)
    add, share, positive = parser.add_argument, between(0, 1), between(1e-12, 1e9)
    beta, onoff = between(0, 100), argparse.BooleanOptionalAction
    add("--val", type=text, help="videos to validate on, as --data (else a tenth of --data)")
    add("--per-class", type=between(1, 10**9, int), help="train on so many videos of each class")
    add("--sampling", choices=KINDS, help="frames at a fixed stride, or one of each segment (SSv2)")
    add("--flip", action=onoff, default=True, help="mirror half; not where left and right matter")
    add("--crop", type=between(1e-3, 1), default=0.08, help="smallest share of a picture to crop")
    add("--scratch", action="store_true", help="train without pre-training")
    add("--probe", action="store_true", help="train a linear layer on the frozen encoder")
    add("--lr", type=positive, help="per 256 videos a step; scaled linearly")
    add("--warmup", type=share, help="share of the steps")
    add("--layer-decay", type=share, help="learning rate of a layer relative to the one above")
    add("--drop-path", type=between(0, 0.99), help="rate of the last block; 0: off, as below")
    add("--dropout", type=between(0, 0.99), help="before the head")
    add("--mixup", type=beta, default=0.8, help="Beta parameter")
    add("--cutmix", type=beta, default=1.0, help="Beta parameter")
    add("--smoothing", type=share, default=0.1, help="of the labels")
    add("--rand-augment", type=between(0, 10), default=7.0, help="magnitude")
    add("--erase", type=share, default=0.25, help="share of the clips that get a random hole")
    add("--out", type=text, help="folder; a run that is in it goes on")
    add("--views", type=sizes(2), default=(7, 3), help="in evaluation, time x space")
    add("--compare", action=onoff, default=False, help="train from scratch too")
    add("--eval", action="store_true", help="only evaluate --init")
    add("--predict", type=text, metavar="VIDEO", help="only print its five likeliest classes")
    add("--features", type=text, metavar="OUT.npz", help="only write pooled features of all videos")
    parser.set_defaults(**dict.fromkeys(SHAPE), clip=5.0)
    return parser

def parse_arguments(argv=None):
    """The flags, and the checkpoint of --init or None. The checkpoint tells the shape of the clips
    and the size of the model, and that the recipe: these are the flags' defaults."""
    parser = make_parser()
    given, content, known = first_look(parser, argv), None, dict(SHAPE)
    demo = not (given.data or given.val or given.predict)
    trained = "runs/finetune/last.pt" if given.eval or given.predict else (
        "runs/pretrain/last.pt" if demo and not given.scratch else None)
    given.init = given.init or trained
    if not given.init and (given.features or not given.scratch) and not given.help:
        raise InputError("no checkpoint: give one with --init, or train without, with --scratch")
    model = given.model or ("tiny" if demo else "large")
    if given.init and not given.help:
        content = load_init(given.init)
        kept, before = content["model_args"], content.get("identity", {})
        model = next((name for name, size in SIZES.items() if all(
            kept.get(key) == size[key] for key in ("dim", "depth", "heads"))), None)
        known |= dict(frames=kept["frames"], size=(kept["height"], kept["width"]),
                      patch=tuple(kept["patch"]))
        known |= {key: before[key] for key in ("stride", "sampling") if key in before}
        for key, value in (("model", model), ("patch", known["patch"])):
            if vars(given)[key] not in (None, value):
                raise InputError(f"--{key} {vars(given)[key]}: {given.init} has {value}; leave the "
                                 "flag out, or choose another checkpoint")
    else:
        known |= {key: value for key, value in PRETRAINING[model].items() if key in SHAPE}
    command = [name for name in ("eval", "probe", "scratch") if vars(given)[name]] + ["finetune"]
    known |= dict(init=given.init, model=model, out=f"runs/{command[0]}",
                  compare=demo and command == ["finetune"])
    known |= RECIPE.get(model, RECIPE["base"]) | (DEMO if demo else {})
    known |= PROBE if given.probe else dict(layer_decay=1.0) if given.scratch else {}
    parser.set_defaults(**known | (dict(steps=None) if given.epochs else {}))
    args = parser.parse_args(argv)
    with in_a_line("the videos do not fit the model", ValueError):
        grid_size((args.frames, *args.size), args.patch)
    return args, content

def main(argv=None):
    args, content = parse_arguments(argv)
    setup(args)
    if not (args.data or args.val or args.predict):
        folder = generate_videos("data/moving_scenes", args)
        args.data, args.val = f"{folder}/train", f"{folder}/val"
    command = (predict if args.predict else export_features if args.features
               else evaluate if args.eval else train_and_compare)
    command(args, content)

if __name__ == "__main__":
    run_script(main)
