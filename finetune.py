"""Fine-tune a pre-trained encoder to tell classes of videos apart: the paper's Kinetics recipe, evaluation, probing, features.

    python finetune.py                                                   no data: the generated videos and runs/pretrain/last.pt
    python finetune.py --data my_videos --init runs/pretrain/last.pt     one sub-folder a class, or a list with "path label" lines
    torchrun --nproc_per_node=8 finetune.py --data train.csv --val val.csv --init pretrained.pyth      the paper's recipe
    python finetune.py --eval --val val.csv --init runs/finetune/last.pt
    python finetune.py --predict clip.mp4 --init runs/finetune/last.pt

From top to bottom: clips and views, augmentation on the device, labels, the model, evaluation, the run, other commands, flags.
"""

import argparse
import inspect
import json
import math
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

# Before torch: train.py sets OMP_WAIT_POLICY, which torch reads when it is loaded.
from train import (BadVideo, InputError, Pretraining, RandomClip, VideoClips, VideoList, as_line, between, build, choose_precision,
                   choose_workers, clip_batches, complete, count, data_errors_explained, demo_videos, generator_of, in_flags,
                   learning_rate, list_videos, load_init, load_weights, make_folder, numbers, of_all_processes, positive, read_clips,
                   run_script, save_checkpoint, shared_arguments, start, to_device, whole, writable)
from train import DEMO as PRETRAINING_DEMO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from mae_st import SIZES, Classifier, Encoder, grid_size, interpolate_positions, normalise

AUGMENT, MIX, FEW = 10, 11, 12  # the second number given to `random`, which keeps uses apart; train.py has 0 to 2

# ------------------------------------------------------------------------------------------ clips and views


def frames_at(places, seconds):
    """When the frames at these places come up: places (T,) as shares of the video, 0 to 1; seconds (n,), one for each frame."""
    return seconds[(places * len(seconds)).astype(int)]  # (T,)


class SegmentClip(RandomClip):
    """One random frame from each of T equal parts of the video, for Something-Something; the stride has no say."""

    def __init__(self, rng, frames, stride, area, flip):
        super().__init__(rng, frames, stride, area, flip)
        self.places = (np.arange(frames) + rng.random(frames)) / frames  # (T,)

    def times(self, seconds):
        return frames_at(self.places, seconds)


KINDS = {"clip": RandomClip, "segments": SegmentClip}


class View:
    """Clip i of K in time and crop j of S in space: what evaluation looks at. See `read_clips`."""

    def __init__(self, i, j, views, frames, stride, size, sampling):
        self.i, self.j, (self.K, self.S), self.size, self.sampling = i, j, views, size, sampling
        self.offsets = np.arange(frames) * stride / 30  # s

    def times(self, seconds):
        """(T,), for frames that come up at seconds (n,). Clip i starts at i * floor((frames - span) / (K - 1)), as in the paper's
        code, a frame being 1/30 s."""
        if self.sampling == "segments":
            return frames_at((np.arange(len(self.offsets)) + (self.i + 0.5) / self.K) / len(self.offsets), seconds)
        room = max(0.0, seconds[-1] - self.offsets[-1]) * 30 + 1e-6  # in frames; 1e-6: whole numbers stay so, whatever * 30 rounds to
        start = self.i * math.floor(room / (self.K - 1)) if self.K > 1 else math.floor(room / 2)
        return start / 30 + self.offsets

    def box(self, width, height):
        """The largest crop of our shape; S of them lie side by side along the side that is too long."""
        H, W = self.size
        w, h = min(1, height * W / H / width), min(1, width * H / W / height)
        place = self.j / (self.S - 1) if self.S > 1 else 0.5
        return ((1 - w) * place, (1 - h) * place, w, h), False


class VideoViews(Dataset):
    """views[i]: all K * S views of the i-th video from one decode."""

    def __init__(self, videos, views, args):
        self.videos, self.size = videos, args.size
        self.views = [View(i, j, views, args.frames, args.stride, args.size, args.sampling)
                      for i in range(views[0]) for j in range(views[1])]

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, i):
        try:
            pixels, bad = read_clips(self.videos[i], self.views, self.size), []  # (K * S, T, H, W, 3)
        except BadVideo as reason:
            pixels, bad = np.zeros((len(self.views), len(self.views[0].offsets), *self.size, 3), np.uint8), [(i, str(reason))]
        return dict(video=torch.from_numpy(pixels), index=i, bad=bad)


# ------------------------------------------------------------------------------- augmentation on the device

# RandAugment (arXiv 1909.13719) with the operations and ranges of "rand-m7-mstd0.5-inc1": a larger m changes more. Each takes
# float pixels x (n, 3, T, H, W) on a scale of 0..255 and m (n, 1, 1, 1, 1) in [-1, 1]; where a direction means nothing it takes
# |m|. What is measured on a picture is measured on the whole clip, so that all its frames change in the same way.

GREY = 115  # 0.45 * 255, comes in where a picture is moved away
PIXELS = (2, 3, 4)  # the dimensions T, H, W


def blend(x, other, m):
    """Away from `other` for m > 0, towards it for m < 0."""
    return other + (x - other) * (1 + 0.9 * m)


def luma(x):
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]  # (n, 1, T, H, W)


def auto_contrast(x, m):
    low, high = x.amin(PIXELS, keepdim=True), x.amax(PIXELS, keepdim=True)  # (n, 3, 1, 1, 1)
    return torch.where(high > low, (x - low) * 255 / (high - low), x)


def equalize(x, m):
    """Spread the values so that each is about equally frequent; integers throughout, as Pillow defines it."""
    values = x.long().flatten(2)  # (n, 3, T * H * W)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=x.device).scatter_add_(2, values, torch.ones_like(values))
    step = (values.shape[2] - counts.gather(2, values.amax(2, keepdim=True))) // 255  # (n, 3, 1)
    table = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)  # (n, 3, 256)
    return torch.where(step > 0, table.clamp(max=255).gather(2, values), values).view(x.shape).float()


def sharpness(x, m):
    n, C, T, H, W = x.shape
    kernel = x.new_ones(1, 1, 3, 3)
    kernel[..., 1, 1] = 5
    kernel /= 13
    smooth = x.clone()
    smooth[..., 1:-1, 1:-1] = F.conv2d(x.reshape(-1, 1, H, W), kernel).view(n, C, T, H - 2, W - 2)  # the edge stays
    return blend(x, smooth, m)


def affine(x, a, b, c, d, e, f):
    """The output at (x, y) shows the input at (a x + b y + c, d x + e y + f), in pixels from the middle."""
    n, C, T, H, W = x.shape
    rows = [[a, b * (H / W), c * (2 / W)], [d * (W / H), e, f * (2 / H)]]  # half a side is 1
    rows = [[number.flatten() if torch.is_tensor(number) else x.new_full((n,), number) for number in row] for row in rows]  # each (n,)
    grid = F.affine_grid(torch.stack([torch.stack(row, 1) for row in rows], 1), (n, C * T, H, W), align_corners=False)  # (n, H, W, 2)
    return F.grid_sample((x - GREY).flatten(1, 2), grid, align_corners=False).view(x.shape) + GREY


def rotate(x, m):
    angle = m * math.radians(30)
    return affine(x, angle.cos(), angle.sin(), 0, -angle.sin(), angle.cos(), 0)


OPERATIONS = {
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "invert": lambda x, m: 255 - x,
    "rotate": rotate,
    "posterize": lambda x, m: x - x % 2 ** (4 + (m.abs() * 4).floor()),  # 4 - floor(4 |m|) bits remain of 8
    "solarize": lambda x, m: torch.where(x < 256 - (m.abs() * 256).floor(), x, 255 - x),
    "solarize_add": lambda x, m: torch.where(x < 128, x + (m.abs() * 110).floor(), x),
    "colour": lambda x, m: blend(x, luma(x), m),
    "contrast": lambda x, m: blend(x, luma(x).mean(PIXELS, keepdim=True).round(), m),
    "brightness": lambda x, m: blend(x, 0, m),
    "sharpness": sharpness,
    "shear_x": lambda x, m: affine(x, 1, 0.3 * m, 0.15 * m * x.shape[3], 0, 1, 0),  # the top row stays where it is
    "shear_y": lambda x, m: affine(x, 1, 0, 0, 0.3 * m, 1, 0.15 * m * x.shape[4]),  # the left column
    "translate_x": lambda x, m: affine(x, 1, 0, 0.45 * m * x.shape[4], 0, 1, 0),
    "translate_y": lambda x, m: affine(x, 1, 0, 0, 0, 1, 0.45 * m * x.shape[3]),
}


def draw_operations(rng, magnitude):
    """[(operation, m)] for one clip: two operations, each left out half of the time."""
    drawn = []
    for _ in range(2):
        name, applied, m, sign = rng.choice(list(OPERATIONS)), rng.random() < 0.5, rng.normal(magnitude, 0.5), rng.choice([-1, 1])
        drawn.append((str(name), sign * min(max(m, 0), 10) / 10) if applied else None)
    return drawn


def rand_augment(video, drawn):
    """Apply to clip b of video (B, 3, T, H, W), uint8 and changed in place, what was drawn for it: drawn[b] of `draw_operations`."""
    for layer in zip(*drawn):
        for name in sorted({operation[0] for operation in layer if operation}):
            rows = [b for b, operation in enumerate(layer) if operation and operation[0] == name]
            m = torch.tensor([layer[b][1] for b in rows], dtype=torch.float32).to(video.device, non_blocking=True)
            rows = torch.tensor(rows).to(video.device, non_blocking=True)  # with a list as the index a GPU would be waited for
            video[rows] = OPERATIONS[name](video[rows].float(), m.view(-1, 1, 1, 1, 1)).clamp(0, 255).round().byte()


def draw_hole(rng, chance, height, width):
    """(top, bottom, left, right) of what random erasing (arXiv 1708.04896) takes out: 2 to 33 % of the picture; or None."""
    if rng.random() >= chance:
        return None
    for _ in range(10):
        area, aspect = rng.uniform(0.02, 1 / 3) * height * width, math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return top, top + h, left, left + w
    return None


def erase(video, holes):
    """Fill the holes of normalised video (B, 3, T, H, W), in place, with noise that is the same in every frame."""
    for clip, hole in zip(video, holes):
        if hole:
            top, bottom, left, right = hole
            clip[:, :, top:bottom, left:right] = torch.randn(3, 1, bottom - top, right - left, device=video.device)


def mix(video, targets, rng, mixup, cutmix):
    """Mix each clip of the batch with its mirror partner, clip b with B - 1 - b: video (B, 3, T, H, W), targets (B, classes).

    mixup (arXiv 1710.09412) adds the two, cutmix (1905.04899) puts a box of one into the other, the same in all frames.
    The targets are mixed in the proportion of what is seen. Where both are asked for, even odds decide.
    """
    if not mixup and not cutmix:
        return video, targets
    other = video.flip(0)
    if cutmix and (not mixup or rng.random() < 0.5):
        (H, W), side = video.shape[3:], math.sqrt(1 - rng.beta(cutmix, cutmix))
        y, x = rng.uniform(0, H), rng.uniform(0, W)  # the middle of the box, which is cut off at the picture's sides
        top, bottom, left, right = (round(min(max(edge, 0), end)) for edge, end in
                                    ((y - side * H / 2, H), (y + side * H / 2, H), (x - side * W / 2, W), (x + side * W / 2, W)))
        share = 1 - (bottom - top) * (right - left) / (H * W)
        video[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    else:
        share = rng.beta(mixup, mixup)
        video = other.lerp_(video, share)
    return video, targets.flip(0).lerp(targets, share)


# --------------------------------------------------------------------------------------------------- labels


class Labelled(NamedTuple):
    classes: list  # names, in the order of the head's outputs
    val: VideoList
    val_labels: list  # numbers of classes
    train: VideoList  # None without --data
    train_labels: list


def labels_of(videos, where):
    if not videos.labels:
        raise InputError(f"{where}: the videos have no labels; sort them into one sub-folder a class, "
                         "or give a list with 'path label' lines")
    if None in videos.labels:
        raise InputError(f"{where}: {videos[videos.labels.index(None)]} lies in no sub-folder, and others do; "
                         "move it into its class, or away")
    return videos.labels


def find_classes(videos, where):
    """Class names in order: the folders' names, or what stands in the list: names, or numbers from 0 to the largest one."""
    names = sorted(set(labels_of(videos, where)))
    if os.path.isdir(where) or not any(name.lstrip("+-").replace(".", "", 1).isdecimal() for name in names):
        return names
    wrong = [name for name in names if not name.isdecimal() or int(name) >= 100_000]
    if wrong:
        raise InputError(f"{where}: label {wrong[0]!r} is not a whole number from 0 to 99999, and others are numbers; "
                         f"number the classes 0, 1, 2, ..., or name them all")
    return [str(number) for number in range(1 + max(map(int, names)))]


def some(names):
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def label_numbers(videos, classes, where):
    """The class of each video, as a number."""
    number = {name: i for i, name in enumerate(classes)}
    names = [str(int(name)) if name.isdecimal() and name not in number else name for name in labels_of(videos, where)]  # 07 is 7
    unknown = sorted(set(names) - number.keys())
    if unknown:
        raise InputError(f"{where}: class {unknown[0]!r} is not among the {len(classes)} classes of the training ({some(classes)}); "
                         "take its videos out, or train with it")
    return [number[name] for name in names]


def subset(videos, rows):
    return VideoList([videos[i] for i in rows], [videos.labels[i] for i in rows] if videos.labels else None)


def find_videos(args, say, classes=None):
    """The labelled videos of --data and --val. classes: those of a trained classifier; otherwise they come from --data."""
    if not args.data and not args.val:
        raise InputError("no videos: give --data, --val or both")
    videos = list_videos(args.data, say) if args.data else None
    classes = classes or find_classes(videos or list_videos(args.val, say), args.data or args.val)
    if args.val:
        val, train = list_videos(args.val, say), videos
    else:
        folder = args.data if os.path.isdir(args.data) else os.path.dirname(os.path.abspath(args.data))
        held_out = [zlib.crc32(os.fsencode(os.path.relpath(path, folder))) % 10 == 0 for path in videos]
        val, train = (subset(videos, [i for i, out in enumerate(held_out) if out == wanted]) for wanted in (True, False))
        if not len(val) or not len(train):
            raise InputError(f"--data {args.data}: a tenth of {len(videos)} videos, chosen by a hash of their paths, "
                             f"is {len(val)} for validation, and {len(train)} for training; give --val")
        say(f"no --val: {len(val)} of {len(videos)} videos are held out for validation, always the same ones, by a hash of their paths")
    val_labels = label_numbers(val, classes, args.val or args.data)
    train_labels = None if train is None else label_numbers(train, classes, args.data)
    if train is not None and args.per_class:
        rows = few(train_labels, args.per_class, generator_of(args.seed, FEW))
        train, train_labels = subset(train, rows), [train_labels[i] for i in rows]
    return Labelled(classes, val, val_labels, train, train_labels)


def few(labels, per_class, rng):
    """Numbers of so many videos of each class, drawn by rng."""
    taken, rows = Counter(), []
    for i in rng.permutation(len(labels)):
        if taken[labels[i]] < per_class:
            taken[labels[i]] += 1
            rows.append(i)
    return sorted(rows)


# ------------------------------------------------------------------------------------------------ the model

ENCODER = inspect.signature(Encoder).parameters  # of the arguments in a checkpoint, what counts here: the rest is the decoder's


def build_classifier(args, content, classes, batch_norm=False):
    """Arguments and model: the encoder of the checkpoint `content`, or of the flags, for the frames and size of the flags."""
    given = content["model_args"] if content else SIZES[args.model] | dict(patch=args.patch)
    height, width = args.size
    arguments = {key: value for key, value in given.items() if key in ENCODER} | dict(
        frames=args.frames, height=height, width=width, classes=classes, dropout=args.dropout, drop_path=args.drop_path,
        batch_norm=batch_norm, checkpointing=args.checkpointing)
    return arguments, build(arguments, Classifier)


def take_weights(model, content, path, new_head, say):
    """Weights of a checkpoint into a classifier. Says what was interpolated and left out; any other difference is an error."""
    weights, before = content["model"], content["model_args"]
    grid = grid_size([before[key] for key in ("frames", "height", "width")], before["patch"])
    left_out = [name for name in weights if name.startswith(("decoder_", "mask_token")) or new_head and name.startswith("head")]
    weights = {name: tensor for name, tensor in weights.items() if name not in left_out}
    words = [f"{len(weights)} tensors loaded"]
    if grid != model.encoder.grid and {"encoder.pos_time", "encoder.pos_space"} <= weights.keys():
        weights = interpolate_positions(weights, grid, model.encoder.grid)
        words.append(f"positions interpolated from {grid} to {model.encoder.grid} patches")
    if new_head:
        weights |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head")}
        words.append("a new head")
    left_out = sorted({name.split(".")[0] for name in [*left_out, *content.get("left_out", [])]})
    load_weights(model, weights, path)
    say(f"{path}: {', '.join(words)}" + (f"; left out: {', '.join(left_out)}" if left_out else ""))


def trained_classifier(args, machine, content):
    """The classifier of a fine-tuned checkpoint and its class names, to be evaluated."""
    head = content["model"].get("head.weight")
    if head is None:
        raise InputError(f"--init {args.init} has no head: it is pre-trained and not fine-tuned yet")
    _, model = build_classifier(args, content, len(head), content["model_args"].get("batch_norm", False))
    take_weights(model, content, args.init, new_head=False, say=machine.say)
    return model.to(machine.device).eval(), content.get("classes") or [str(i) for i in range(len(head))]


def layer_groups(model, weight_decay, layer_decay):
    """Parameter groups for AdamW: the rate of layer l of L is multiplied by layer_decay^(L - l) (BEiT, arXiv 2106.08254).

    Layer 0 is the patch embedding with tokens and positions, then the blocks, L the last norm and the head. No weight
    decay on biases and other 1-d parameters. What is frozen stays out.
    """
    last, groups = len(model.encoder.blocks) + 1, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_block = name.startswith("encoder.blocks.")
            layer = int(name.split(".")[2]) + 1 if in_block else last if name.startswith(("encoder.norm.", "head.")) else 0
            decay = 0.0 if parameter.dim() <= 1 else weight_decay
            group = groups.setdefault((layer, decay), dict(params=[], weight_decay=decay, scale=layer_decay ** (last - layer)))
            group["params"].append(parameter)
    return list(groups.values())


# ----------------------------------------------------------------------------------------------- evaluation

CLIPS_AT_ONCE = 32  # of evaluation, in one forward pass


def for_each_video(compute, videos, views, args, machine, title):
    """compute(clips (B * V, 3, T, H, W)) -> (B * V, n); its mean over the V views of each video: (videos, n), NaN where unreadable.

    The videos are put into groups, and whole groups are dealt to the processes: the numbers do not depend on how many there are.
    """
    dtype, _ = choose_precision(args.amp, machine.device)
    workers, _ = choose_workers(args.workers, machine.device, machine.ranks_here)
    V, n = views[0] * views[1], len(videos)
    together = max(1, CLIPS_AT_ONCE // V)
    groups = [list(range(first, min(first + together, n))) for first in range(0, n, together)][machine.rank::machine.world]
    batches = iter(clip_batches(VideoViews(videos, views, args), groups, workers, machine.device, args.data_timeout))
    parts, group = [], []  # parts: (numbers of the videos, rows (B, n), what could not be read) of each group
    with data_errors_explained(lambda: [videos[i] for i in group]), torch.inference_mode():
        for group in tqdm(groups, desc=title, unit="batch", disable=machine.rank > 0, leave=False, dynamic_ncols=True):
            batch = next(batches)
            clips, = to_device(batch, ["video"], machine.device)  # (B * V, 3, T, H, W)
            with torch.autocast(machine.device.type, dtype, enabled=dtype is not None):
                rows = compute(clips)  # (B * V, n)
            parts.append((group, rows.float().unflatten(0, (-1, V)).mean(1), batch["bad"]))  # stays on the device: no waiting
    parts = [(group, rows.cpu().numpy(), bad) for group, rows, bad in parts]
    parts = sorted(of_all_processes(parts, machine), key=lambda part: part[0])
    for i, reason in [entry for _, _, bad in parts for entry in bad]:
        machine.say(f"cannot be read: {videos[i]}: {reason}")
    out = np.concatenate([rows for _, rows, _ in parts])  # (videos, n)
    out[[i for _, _, bad in parts for i, _ in bad]] = np.nan
    return out


def softmax_scores(model):
    return lambda clips: model(clips).float().softmax(-1)


def places(scores, labels):
    """(n,) how many classes score as high as the right one or higher; an unreadable video comes last and is wrong."""
    right = np.take_along_axis(scores, np.asarray(labels)[:, None], 1)  # (n, 1)
    return np.where(np.isnan(right[:, 0]), scores.shape[1] + 5, (scores >= right).sum(1) - 1)


def accuracy(scores, labels):
    """Top-1 and top-5 in per cent, and of how many videos."""
    place = places(scores, labels)
    return dict(val_acc1=100 * float((place < 1).mean()), val_acc5=100 * float((place < 5).mean()), videos=len(place))


def write_predictions(out, scores, data):
    """predictions.jsonl, one object a video: its path, its class, the place of that class (0 is right), the five best classes."""
    with open(out / "predictions.jsonl", "w") as file:
        for video, label, row, place in zip(data.val, data.val_labels, scores, places(scores, data.val_labels)):
            best = {data.classes[c]: round(float(row[c]), 6) for c in np.argsort(-row, kind="stable")[:5]} if not np.isnan(row[0]) else {}
            file.write(json.dumps(dict(video=video, label=data.classes[label], place=int(place), top5=best)) + "\n")


def add_line(path, line):
    """Append it, unless it is there already: a finished run that is started again comes to the same result."""
    with open(path, "a+") as file:
        file.seek(0)
        text = file.read()
        if line not in text.splitlines(keepends=True):
            file.write(line if text.endswith("\n") or not text else f"\n{line}")  # after a line that a crash has cut off


def in_words(result, views):
    return (f"top-1 {result['val_acc1']:.2f} %, top-5 {result['val_acc5']:.2f} % of {result['videos']} videos, "
            f"{views[0]}x{views[1]} views each")


# -------------------------------------------------------------------------------------------------- the run


def checksum(tensor):
    return zlib.crc32(tensor.numpy().tobytes())


class Finetuning(Pretraining):
    """The loop of pre-training with a classifier, labels and augmentation in it."""

    DECIDES = ("model frames stride size patch sampling flip repeat crop init scratch probe per_class lr end_lr layer_decay weight_decay "
               "warmup clip drop_path dropout mixup cutmix smoothing rand_augment erase seed")
    BETAS = 0.9, 0.999

    def __init__(self, args, machine, data, content):
        self.data, self.content = data, content
        super().__init__(args, machine)
        self.peak_lr *= args.repeat  # this recipe counts clips, not videos
        self.labels = torch.tensor(data.train_labels)  # (videos,)
        self.best, self.result = dict(val_acc1=-1.0, step=0), None

    def find_videos(self):
        return self.data.train

    def make_model(self):
        args, content = self.args, self.content
        arguments, model = build_classifier(args, content, len(self.data.classes), batch_norm=args.probe)
        if content and not args.scratch:
            same_head = content.get("classes") == self.data.classes and content["model_args"].get("batch_norm", False) == args.probe
            take_weights(model, content, args.init, new_head=not same_head, say=self.machine.say)
        model.encoder.requires_grad_(not args.probe)
        return arguments, model.to(self.device)

    def parameter_groups(self):
        return layer_groups(self.model, self.args.weight_decay, self.args.layer_decay)

    def make_clips(self, repeat):
        args = self.args
        return VideoClips(self.videos, seed=args.seed, repeat=repeat, frames=args.frames, stride=args.stride, size=args.size,
                          area=(args.crop, 1.0), flip=args.flip, kind=KINDS[args.sampling])

    def identity(self):
        # One table stands for all weights of --init: training moves it.
        weights = self.content["model"]["encoder.pos_time"].float() if self.content else torch.zeros(0)
        return super().identity() | dict(classes=len(self.data.classes), labels=checksum(self.labels), init_weights=checksum(weights))

    def state(self):
        return super().state() | dict(classes=self.data.classes, best=self.best)

    def restore(self, content):
        super().restore(content)
        self.best = content["best"]

    def describe_model(self):
        args, trained = self.args, sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6
        return (f"model: {args.model}, {count(self.model):.1f} M parameters, {trained:.3g} M trained"
                f"{' from scratch' if args.scratch else ''}; {len(self.data.classes)} classes ({some(self.data.classes)}), "
                f"{len(self.videos)} videos to train, {len(self.data.val)} to validate")

    def rate(self, step):
        """Linearly up and down half a cosine, as in pre-training, but from and to `end_lr` in place of 0."""
        end = self.peak_lr * self.args.end_lr / self.args.lr
        return end + learning_rate(step, self.steps, self.peak_lr - end, self.args.warmup)

    def next_batch(self, step, micro):
        """Augmented clips (B * R, 3, T, H, W), normalised, and their targets (B * R, classes). What happens to a clip follows
        from its sample number, what happens to the batch (and drop path, and dropout) from step and rank: nothing is kept."""
        args, classes = self.args, len(self.data.classes)
        batch = self.fetch(step, micro)
        batch["label"] = self.labels[batch["index"]].repeat_interleave(args.repeat)  # (B * R,)
        video, labels = to_device(batch, ("video", "label"), self.device, self.copy_stream)
        rng = generator_of(args.seed, MIX, step, micro, self.machine.rank)
        torch.manual_seed(int(rng.integers(2**62)))
        generators = [generator_of(args.seed, AUGMENT, k, r) for k in self.sampler.samples(step, micro) for r in range(args.repeat)]
        if args.rand_augment:
            rand_augment(video, [draw_operations(generator, args.rand_augment) for generator in generators])
        video = normalise(video)
        erase(video, [draw_hole(generator, args.erase, *args.size) for generator in generators])
        return mix(video, F.one_hot(labels, classes).float(), rng, args.mixup, args.cutmix)

    def loss(self, model, video, targets):
        return F.cross_entropy(model(video).float(), targets, label_smoothing=self.args.smoothing)

    def score(self, views, title):
        """Softmax scores of the validation videos: (videos, classes), NaN where unreadable."""
        if self.machine.world > 1:  # each process has its own running mean of the batch-norm
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        self.model.eval()
        scores = for_each_video(softmax_scores(self.model), self.data.val, views, self.args, self.machine, title)
        self.model.train()
        return scores

    def save(self):
        """At a planned checkpoint the validation videos are looked at first, one view each; a signal does not wait for that."""
        first = self.machine.rank == 0
        if self.step % self.save_every == 0 or self.step == self.steps:
            result = accuracy(self.score((1, 1), "validation"), self.data.val_labels)
            self.log.write(**self.row_of(result, (1, 1)))
            self.machine.say(f"step {self.step}: {in_words(result, (1, 1))}")
            if result["val_acc1"] > self.best["val_acc1"]:
                self.best = dict(val_acc1=result["val_acc1"], step=self.step)
                if first:
                    save_checkpoint(self.out, self.state(), 1, "best")
        if first:
            save_checkpoint(self.out, self.state(), self.args.keep)

    def row_of(self, result, views):
        """An evaluation's line of the log."""
        return dict(step=self.step, epoch=self.step * self.videos_per_step / len(self.videos), views=f"{views[0]}x{views[1]}", **result)

    def conclude(self):
        scores = self.score(self.args.views, "evaluation")
        self.result = accuracy(scores, self.data.val_labels)
        if self.machine.rank == 0:
            write_predictions(self.out, scores, self.data)
            add_line(self.out / "log.jsonl", as_line(self.row_of(self.result, self.args.views)))
        self.machine.say(f"done: {self.steps} steps, {in_words(self.result, self.args.views)} "
                         f"(with one view the best was {self.best['val_acc1']:.2f} % after step {self.best['step']}: best.pt); "
                         f"{self.out}/last.pt, log.jsonl and predictions.jsonl")


def fine_tune(args, machine, content):
    """Fine-tune; with --compare, train from scratch too and say both."""
    data = find_videos(args, machine.say)
    if data.train is None:
        raise InputError("nothing to train on: give --data")
    run = Finetuning(args, machine, data, content)
    status = run.run()
    if status or not args.compare:
        return status
    args_of_scratch = argparse.Namespace(**vars(args) | dict(scratch=True, layer_decay=1.0, out=f"{args.out}/scratch"))
    scratch = Finetuning(args_of_scratch, machine, data, content)
    status = scratch.run()
    if not status:
        machine.say(f"top-1 on {len(data.val)} videos after {run.steps} steps on {len(data.train)} labelled videos, seed {args.seed}: "
                    f"{run.result['val_acc1']:.1f} % pre-trained, {scratch.result['val_acc1']:.1f} % from scratch")
    return status


# ------------------------------------------------------------------------------------------- other commands


def evaluate(args, machine, content):
    """--eval: the accuracy of a fine-tuned checkpoint, and predictions.jsonl."""
    model, classes = trained_classifier(args, machine, content)
    data, out = find_videos(args, machine.say, classes), Path(args.out)
    make_folder(out)
    scores = for_each_video(softmax_scores(model), data.val, args.views, args, machine, "evaluation")
    if machine.rank == 0:
        write_predictions(out, scores, data)
    machine.say(f"{in_words(accuracy(scores, data.val_labels), args.views)}; {out}/predictions.jsonl")
    return 0


def predict(args, machine, content):
    """--predict: the five likeliest classes of one video."""
    model, classes = trained_classifier(args, machine, content)
    scores = for_each_video(softmax_scores(model), VideoList([args.predict]), args.views, args, machine, "looking")[0]  # (classes,)
    if np.isnan(scores[0]):
        raise InputError(f"--predict {args.predict} cannot be read as a video (the reason stands above); give another file")
    for c in np.argsort(-scores, kind="stable")[:5]:
        machine.say(f"{scores[c]:6.1%}  {classes[c]}")
    return 0


def export_features(args, machine, content):
    """--features: what the head sees of every video, the mean over the views, with path, label and part (train or val)."""
    data = find_videos(args, machine.say, content.get("classes"))
    _, model = build_classifier(args, content, len(data.classes))
    take_weights(model, content, args.init, new_head=True, say=machine.say)
    model = model.to(machine.device).eval()
    if machine.rank == 0:
        with writable(f"--features {args.features}"):
            open(args.features, "ab").close()  # a try, before hours are spent
    train = data.train or []
    videos = VideoList([*train, *data.val])
    features = for_each_video(model.pooled, videos, args.views, args, machine, "features")
    if machine.rank == 0:
        with writable(f"--features {args.features}"), open(args.features, "wb") as file:  # to a name alone numpy would add .npz
            np.savez(file, features=features, labels=np.array((data.train_labels or []) + data.val_labels), classes=np.array(data.classes),
                     paths=np.array(list(videos)), part=np.repeat(["train", "val"], [len(train), len(data.val)]))
    machine.say(f"{args.features}: features of {len(videos)} videos, {model.head.in_features} numbers each; "
                "NaN where a video cannot be read")
    return 0


# ------------------------------------------------------------------------------------------------ arguments

# What the recipe says by size (PAPER.md names the table); warm-up is 5 epochs.
RECIPE = {
    "base": dict(epochs=75, repeat=2, layer_decay=0.65, drop_path=0.1, dropout=0.3, warmup=5 / 75),
    "large": dict(epochs=50, repeat=2, layer_decay=0.75, drop_path=0.2, dropout=0.3, warmup=5 / 50),
    "huge": dict(epochs=75, repeat=1, layer_decay=0.8, drop_path=0.2, dropout=0.5, warmup=5 / 75),
}
SHAPE = dict(model="large", frames=16, size=(224, 224), patch=(2, 16, 16), stride=4.0, sampling="clip")  # where no checkpoint tells
PLAIN = dict(layer_decay=1.0, drop_path=0.0, dropout=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0, rand_augment=0.0, erase=0.0)
# A linear layer is hardly able to overfit: nothing holds it back. MAE's own probing has LARS, here it is AdamW as everywhere.
PROBE = dict(lr=6.4e-2, end_lr=0.0, weight_decay=0.0, **PLAIN)
# Without --data: a mirrored or turned motion is another class, and a mixed one is none.
DEMO = dict(per_class=5, steps=200, save_every=100, batch_size=16, repeat=4, lr=0.024, end_lr=0.0, warmup=0.1, **PLAIN,
            flip=False, crop=0.5, views=(3, 1))


def parse_arguments(argv=None):
    parser, data, method, recipe, run = shared_arguments(__doc__.split("\n\n")[0])
    by_size = "; ".join(f"{size}: " + ", ".join(f"{key} {value:.3g}" for key, value in RECIPE[size].items()) for size in RECIPE)
    parser.epilog = ("Where no default is shown: shape, stride and sampling come from the checkpoint, the rest from the paper's recipe "
                     f"for its size. {by_size}; tiny and small: as base. Without --data, to show that it works: {in_flags(DEMO)}.")
    share = between(0, 1)
    data.add_argument("--val", help="videos to validate on, as --data (default: a fixed tenth of --data)")
    data.add_argument("--per-class", type=whole, help="train on so many videos of each class (default: all)")
    data.add_argument("--sampling", choices=KINDS, help="frames at a fixed stride, or one of each of so many equal parts (for SSv2)")
    data.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                      help="mirror half of the clips; not where left and right matter")
    data.add_argument("--crop", type=between(1e-3, 1), default=0.08, help="smallest share of the picture that a training clip shows")
    method.add_argument("--scratch", action="store_true", help="train without pre-training (a checkpoint then gives the shape alone)")
    method.add_argument("--probe", action="store_true", help="train a linear layer on the frozen encoder")
    recipe.add_argument("--lr", type=positive, default=4.8e-3, help="learning rate per 512 clips a step; scaled linearly")
    recipe.add_argument("--end-lr", type=between(0, 1), default=1.6e-4, help="the rate at the beginning and the end, per 512 clips")
    recipe.add_argument("--warmup", type=share, help="share of the steps")
    recipe.add_argument("--layer-decay", type=share, help="learning rate of a layer relative to the one above")
    recipe.add_argument("--drop-path", type=between(0, 0.99), help="rate at which the last block's branches are skipped; 0: off, as below")
    recipe.add_argument("--dropout", type=between(0, 0.99), help="before the head")
    recipe.add_argument("--mixup", type=between(0, 100), default=0.8, help="Beta parameter")
    recipe.add_argument("--cutmix", type=between(0, 100), default=1.0, help="Beta parameter")
    recipe.add_argument("--smoothing", type=share, default=0.1, help="of the labels")
    recipe.add_argument("--rand-augment", type=between(0, 10), default=7.0, help="magnitude")
    recipe.add_argument("--erase", type=share, default=0.25, help="share of the clips that get a random hole")
    run.add_argument("--out", help="folder of the run; if it holds one, that one goes on (default: runs/finetune, probe, scratch or eval)")
    two_numbers = numbers((2,), "a number of views such as 7x3 (time x space)")
    run.add_argument("--views", type=two_numbers, default=(7, 3), help="of each video in evaluation, time x space")
    run.add_argument("--compare", action=argparse.BooleanOptionalAction, default=False,
                     help="train from scratch too (default without --data)")
    run.add_argument("--eval", action="store_true", help="only evaluate --init")
    run.add_argument("--predict", metavar="VIDEO", help="only print the five likeliest classes of this video")
    run.add_argument("--features", metavar="OUT.npz", help="only write pooled features, paths and labels of every video (all need labels)")
    parser.set_defaults(**dict.fromkeys((*SHAPE, *RECIPE["base"])), clip=5.0)
    first = parser.parse_known_args(argv)[0]
    if first.data is None and first.val is None and first.predict is None:
        parser.set_defaults(**DEMO | (dict(steps=None) if first.epochs else {}), compare=not (first.scratch or first.probe))
        trained = dict(init="runs/finetune/last.pt" if first.eval else "runs/pretrain/last.pt")
        parser.set_defaults(**{key: PRETRAINING_DEMO[key] for key in SHAPE if key in PRETRAINING_DEMO} if first.scratch else trained)
    if first.probe:
        parser.set_defaults(**PROBE)
    return parser.parse_args(argv)


def fill_in(args, machine, content):
    """What was not asked for: the shape from the checkpoint, the recipe from the size, the rest from the machine."""
    known = dict(SHAPE)
    if content:
        kept, identity = content["model_args"], content.get("identity", {})
        name = next((name for name, size in SIZES.items() if all(kept.get(key) == size[key] for key in ("dim", "depth", "heads"))), None)
        known |= dict(model=name, frames=kept["frames"], size=(kept["height"], kept["width"]), patch=tuple(kept["patch"]))
        known |= {key: identity[key] for key in ("stride", "sampling") if key in identity}
        for key in ("model", "patch"):
            if getattr(args, key) not in (None, known[key]):
                raise InputError(f"--{key} {getattr(args, key)}: {args.init} has {known[key]}; leave the flag out, "
                                 "or choose another checkpoint")
    known |= RECIPE.get(args.model or known["model"], RECIPE["base"]) | (dict(layer_decay=1.0) if args.scratch else {})
    for key, value in known.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.data is None and args.val is None and args.predict is None:
        folder = demo_videos(machine)
        args.data, args.val = f"{folder}/train", f"{folder}/val"
    args.out = args.out or "runs/" + ("eval" if args.eval else "probe" if args.probe else "scratch" if args.scratch else "finetune")
    complete(args, machine)


def main(argv=None):
    args = parse_arguments(argv)
    if not args.init and (not args.scratch or args.eval or args.predict or args.features):
        raise InputError("no checkpoint: give one with --init, or train without pre-training with --scratch")
    machine = start(args.device)
    content = load_init(args.init) if args.init else None
    fill_in(args, machine, content)
    command = predict if args.predict else export_features if args.features else evaluate if args.eval else fine_tune
    return command(args, machine, content)


if __name__ == "__main__":
    run_script(main)
