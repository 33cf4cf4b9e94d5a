"""Measure what masking saves on this machine, beside the arithmetic that predicts it.

    python bench.py                              the table: dense, then 50, 75, 90 and 95 % hidden
    python bench.py --flops --model huge         the arithmetic alone, at once
    python bench.py --loader my_videos           reading clips alone, beside the straightforward way
    python bench.py --end-to-end my_videos       computing, and loading + computing: Table 1 of the paper in full
    python bench.py --profile 0.9                where the time of a step goes
    python bench.py --miniature lines.jsonl      the paper's findings in small, on generated videos; goes on where it stopped

Tables go to stdout as Markdown, everything else to stderr.
From top to bottom: the arithmetic, the dense baseline, timing a step, loading, both together, the miniature, tables and chart, the run.
"""

import argparse
import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Before torch: train.py sets OMP_WAIT_POLICY, which torch reads when it is loaded.
from train import (DEMO, BadVideo, InputError, Parser, RandomClip, Skipped, StepSampler, VideoClips, available_cpus, between, build,
                   choose_precision, choose_workers, clip_batches, count_tokens, data_errors_explained, decay_groups, elapsed,
                   generate_videos, generator_of, in_flags, list_videos, mark, positive, precision_name, read_clips, run_script, shown_at,
                   square, start, three_sizes, to_device, update, whole, writable, write_video)

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import finetune
from mae_st import SIZES, STRATEGIES, MaskedAutoencoder, mask_noise, normalise, small_normal, take

# ------------------------------------------------------------------------------------------- the arithmetic

DENSE_RATIO = 0.9  # of the dense row: Table 1 compares both encoders at 90 %


def linear_weights(module):
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def block_macs(blocks, tokens, dim):
    """Every weight is used once per token; q k^T, and the attention times v, take tokens^2 * dim each."""
    return linear_weights(blocks) * tokens + len(blocks) * 2 * tokens**2 * dim


def multiply_adds(model, visible, hidden, embedded, dense=False):
    """Forward multiply-adds of one clip, (encoder, decoder), of the linear layers and the attention.

    Tokens: visible in the encoder, which also sees the hidden ones if dense; hidden to be decoded and predicted;
    embedded through the patch embedding. With all of them embedded ViT-L comes to 628.5 G dense and 81.6 G at 90 %.
    Table 1 has 627.5 and 81.0; without the last layer, width to pixels, it would be 627.9 and 81.0.
    """
    seen, decoded = 1 + visible + dense * hidden, 1 + visible + hidden  # with the class token
    encoder = linear_weights(model.encoder.embed) * embedded + block_macs(model.encoder.blocks, seen, model.decoder_embed.in_features)
    decoder = linear_weights(model.decoder_embed) * seen + block_macs(model.decoder_blocks, decoded, model.decoder_embed.out_features)
    return encoder, decoder + linear_weights(model.decoder_pred) * hidden


def arithmetic(model, args):
    """The part of the table that needs no measuring: the dense row, then one row per ratio."""
    rows, tokens = [], math.prod(model.encoder.grid)
    for dense, ratio in [(True, DENSE_RATIO)] + [(False, ratio) for ratio in args.ratios]:
        visible, hidden = count_tokens(model, args.strategy, ratio)
        decoded = hidden if dense else max(1, round(hidden * args.decode_ratio))
        encoder, decoder = multiply_adds(model, visible, decoded, visible, dense)
        as_paper = sum(multiply_adds(model, visible, decoded, tokens, dense))
        rows.append(dict(name="dense" if dense else f"{100 * ratio:.4g} %", dense=dense, mask_ratio=ratio,
                         visible_tokens=tokens if dense else visible, gmacs=(encoder + decoder) / 1e9,
                         gmacs_encoder=encoder / 1e9, gmacs_decoder=decoder / 1e9, gmacs_as_paper=as_paper / 1e9))
    for row in rows:
        row["predicted_speedup"] = rows[0]["gmacs"] / row["gmacs"]
    return rows


# --------------------------------------------------------------------------------------- the dense baseline


class WithDense(MaskedAutoencoder):
    """The model with a second way through it, the baseline of Table 1: hidden tokens are replaced by a learned token
    before the encoder, which then sees all of them. Same decoder (but all its tokens come out of the encoder, so its own mask
    token has no use), same loss, and the same weights, so the rows of the table share one model and its memory. Only visible
    patches are embedded here too: the rows differ in the encoder alone.
    """

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.encoder_mask_token = small_normal(1, self.decoder_embed.in_features)

    def dense(self, video, mask_ratio, noise):
        """The loss, as `forward` gives it. Tokens stand as in `decode`: class, visible, hidden."""
        encoder, positions = self.encoder, self.encoder.positions()
        patches = encoder.patches(video)  # (B, N, P)
        keep, hide = self.split(patches, mask_ratio, noise)  # (B, K), (B, M)
        visible = encoder.embed(normalise(take(patches, keep))) + F.embedding(keep, positions)  # (B, K, D)
        hidden = self.encoder_mask_token + F.embedding(hide, positions)  # (B, M, D)
        cls = (encoder.cls_token + encoder.pos_cls).expand(len(patches), 1, -1)  # (B, 1, D)
        x = torch.cat([cls, visible, hidden], dim=1)  # (B, 1 + N, D)
        for block in encoder.blocks:
            x = block(x)
        rows = F.pad(torch.cat([keep, hide], dim=1) + 1, (1, 0))  # (B, 1 + N), of the decoder's position table
        x = self.decoder_embed(encoder.norm(x)) + F.embedding(rows, self.decoder_pos)
        for block in self.decoder_blocks:
            x = block(x)
        prediction = self.decoder_pred(self.decoder_norm(x[:, -hide.shape[1]:]))  # (B, M, target)
        target, _ = self.targets(patches, hide)
        return F.mse_loss(prediction.to(target.dtype), target)


def make_model(args, device):
    """The model of these arguments, made on the device; "meta" gives its shapes alone."""
    height, width = args.size
    decoder = dict(decoder_dim=args.decoder_width, decoder_depth=args.decoder_depth)
    arguments = SIZES[args.model] | {key: value for key, value in decoder.items() if value is not None}
    with torch.device(device):
        return build(arguments | dict(frames=args.frames, height=height, width=width, patch=args.patch), WithDense)


# ------------------------------------------------------------------------------------------- timing a step


def timed(work, device, times=1):
    """Seconds that one call of work() takes."""
    begin = mark(device)
    for _ in range(times):
        work()
    return elapsed(begin, mark(device)) / times


class Run:
    """What the rows share: the device, the model, its optimizer, the random video."""

    def __init__(self, args, machine):
        self.args, self.machine, self.device = args, machine, machine.device
        self.dtype, reason = choose_precision(args.amp, self.device)
        self.compile = self.device.type == "cuda" if args.compile is None else args.compile
        compile_reason = "the default: on a GPU, a CPU gains nothing" if args.compile is None else "as asked"
        # For headings and --json; from here on these three are what was chosen, in words.
        args.device = name_of(self.device) + ("" if self.device.type == "cuda" else f", {torch.get_num_threads()} threads")
        args.amp, args.compile = precision_name(self.dtype, self.device), self.compile
        machine.say(f"precision: {args.amp} ({reason}); compile: {self.compile} ({compile_reason})")
        torch.compiler.config.recompile_limit = 64  # every row, and every batch that was halved, is a version of one function
        torch.manual_seed(0)
        self.model = make_model(args, self.device)
        self.optimizer = torch.optim.AdamW(decay_groups(self.model, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def step(self, loss_function, video, noise):
        """train.py's step: forward, backward, clipping, AdamW."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss = loss_function(video, noise)
        self.scaler.scale(loss).backward()
        update(self.optimizer, self.scaler, self.model.parameters(), 0.02, loss.detach())

    def videos_that_fit(self, encoder_tokens):
        """A batch that should fit, a power of two; running out of memory is caught all the same."""
        model = self.model
        units = len(model.encoder.blocks) * model.decoder_embed.in_features * encoder_tokens
        units += len(model.decoder_blocks) * model.decoder_embed.out_features * math.prod(model.encoder.grid)
        # About so many bytes per token, block and unit of width wait for the backward pass.
        kept = units * (80 if self.dtype is None else 40)
        # Half of a GPU's memory. On a CPU time sets the limit: with 0.75 GB the default table takes one to two minutes on two cores.
        budget = torch.cuda.get_device_properties(self.device).total_memory / 2 if self.device.type == "cuda" else 0.75e9
        return 2 ** max(0, math.floor(math.log2(budget / (kept * self.args.repeat))))


class Row:
    """A row of the table while it is measured: its way through the model, its batch, its times."""

    def __init__(self, run, line):
        self.run, self.device, self.line = run, run.device, line
        self.videos = run.args.batch_size or run.videos_that_fit(line["visible_tokens"])
        self.times, self.steps, self.memory = [], 1, None
        dense, ratio, share = line["dense"], line["mask_ratio"], run.args.decode_ratio

        def loss_function(video, noise):
            return run.model.dense(video, ratio, noise) if dense else run.model(video, ratio, noise, share)

        # dynamic=False: code for each row's own sizes. fullgraph=True: an error, not a quiet return to uncompiled code.
        self.loss_function = torch.compile(loss_function, dynamic=False, fullgraph=True) if run.compile else loss_function

    @property
    def clips(self):
        return self.videos * self.run.args.repeat

    def step(self):
        noise = mask_noise(self.run.args.strategy, self.clips, self.run.model.encoder.grid, device=self.device)
        # Contiguous, as from the loader, so that nothing is compiled twice.
        self.run.step(self.loss_function, self.run.video[:self.clips], noise.contiguous())

    def warm_up(self):
        """The first steps, compiling included; none of them counts."""
        first = once = timed(self.step, self.device)
        if self.run.compile or self.device.type == "cuda":
            once = timed(self.step, self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            once = timed(self.step, self.device, 3)
            self.memory = torch.cuda.max_memory_allocated() / 1e9
        self.steps = max(1, math.ceil(0.5 / once))  # to a measurement: half a second at least
        compiling = ", compiling included" if self.run.compile else ""
        self.run.machine.say(f"{self.line['name']}: {self.clips} clips a step, the first took {first:.1f} s{compiling}, and is not counted")


def fit(row):
    """Warm up; as long as memory runs out, halve the batch and say so."""
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            return row.warm_up()
        if row.videos == 1:  # we come here without the exception, so the tensors that it held are free
            raise InputError(f"out of memory at one video, {row.clips} clips: choose a smaller --model, --size or --repeat")
        row.run.machine.say(f"{row.line['name']}: out of memory at {row.clips} clips a step; the batch is halved")
        row.videos //= 2
        row.run.optimizer.zero_grad(set_to_none=True)
        row.run.optimizer.state.clear()  # which may be half made
        if row.device.type == "cuda":
            torch.cuda.empty_cache()


# Names of kernels, or of operators. Inductor's fused kernels carry the names of what they stand beside.
MATRIX = re.compile(r"^triton_tem_|^(?!triton_).*(gemm|mm$|cutlass|nvjet|flash|attention|fmha|cudnn_generated|cudnn::fusion|splitkreduce)",
                    re.IGNORECASE)


def profile(args):
    """--profile RATIO: where the time of a step goes: heading, columns and rows, the costliest first."""
    machine, steps = start(args.device), 5
    gpu, args.ratios = machine.device.type == "cuda", [args.profile]
    run = Run(args, machine)
    row = Row(run, arithmetic(run.model, args)[1])
    run.video = random_video(row.clips, args, machine.device)
    fit(row)
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            row.step()
        if gpu:
            torch.cuda.synchronize()
    events = profiler.key_averages()  # of operators, and on a GPU of its kernels, which are what counts there
    if gpu:
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation]
    found = [(event.key, event.count, event.self_device_time_total if gpu else event.self_cpu_time_total) for event in events]
    total = sum(microseconds for _, _, microseconds in found)
    if not total:
        raise InputError("--profile: the profiler saw nothing run; on a GPU it needs CUPTI, and permission for it")
    rows = [dict(name=name[:60].replace("|", "/"), ms=microseconds / steps / 1e3, share=microseconds / total, calls=count / steps,
                 matrix="yes" if MATRIX.search(name) else "")
            for name, count, microseconds in sorted(found, key=lambda event: -event[2])[:20]]
    others = sum(microseconds for name, _, microseconds in found if not MATRIX.search(name)) / total
    return [f"{headline(args)} {describe(args, run.model)} {row.line['name']} hidden, {row.clips} clips a step: "
            f"{others:.0%} of the time is neither matrix product nor attention."], PROFILE, rows


def random_video(clips, args, device):
    """uint8 (B, 3, T, H, W), in memory as the loader delivers it: a view of (B, T, H, W, 3)."""
    return torch.randint(256, (clips, args.frames, *args.size, 3), dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)


def measure(run, rows):
    """Time all rows, and a large matrix product, in turn, so that drift hits all alike; returns the product's TFLOP/s."""
    run.video = random_video(max(row.clips for row in rows), run.args, run.device)
    for row in rows:
        fit(row)
    side, times = (8192, 20) if run.device.type == "cuda" else (2048, 2)
    a, b = (torch.randn(side, side, device=run.device, dtype=run.dtype or torch.float32) for _ in range(2))
    a @ b
    products = []
    for _ in tqdm(range(run.args.rounds), desc="measuring", unit="round", dynamic_ncols=True):
        for row in rows:
            row.times.append(timed(row.step, run.device, row.steps))
        products.append(timed(lambda: a @ b, run.device, times))
    return 2 * side**3 / 1e12 / statistics.median(products)


def results(rows, product_tflops):
    """The measured rows. The backward pass is counted as twice the forward pass."""
    table = []
    for row in rows:
        step = statistics.median(row.times)
        table.append(row.line | dict(clips=row.clips, clips_per_s=row.clips / step, peak_mem_gb=row.memory, step_ms=step * 1e3,
                                     step_ms_min=min(row.times) * 1e3, step_ms_max=max(row.times) * 1e3))
    for line in table:
        line["speedup"] = line["clips_per_s"] / table[0]["clips_per_s"]
        line["measured_over_predicted"] = line["speedup"] / line["predicted_speedup"]
        line["tflops"] = line["gmacs"] * 2 * 3 * line["clips_per_s"] / 1e3
        line["share_of_product"] = line["tflops"] / product_tflops
    return table


# -------------------------------------------------------------------------------------------------- loading


def kinetics_like(rng, frames=300, height=256, width=340):
    """Detailed texture under a moving camera, three things moving before it, and a camera's noise: uint8 (T, H, W, 3)."""
    def texture(h, w):
        layers = [torch.from_numpy(rng.normal(scale=32, size=(1, 3, cells, cells))) for cells in (3, 10, 30, 100)]  # coarse to fine
        return 127 + sum(F.interpolate(layer, size=(h, w), mode="bicubic") for layer in layers)[0].permute(1, 2, 0).numpy()

    def sway(room):  # there and back again: (T,) pixels
        return (room * (1 + np.sin(np.arange(frames) / rng.uniform(20, 60) + rng.uniform(0, 6))) / 2).astype(int)

    side, noise, video = height // 3, rng.uniform(6, 10), np.empty((frames, height, width, 3), np.uint8)
    scene, down, across = texture(2 * height, 2 * width), sway(height), sway(width)
    things = [(texture(side, side), sway(height - side), sway(width - side)) for _ in range(3)]
    for t in range(frames):
        picture = scene[down[t]:, across[t]:][:height, :width].copy()
        for thing, y, x in things:
            picture[y[t]:, x[t]:][:side, :side] = thing
        video[t] = (picture + rng.normal(scale=noise, size=picture.shape)).clip(0, 255)
    return video


def find_videos(given):
    """The videos of a folder or list, or, where the flag came alone, files like those of Kinetics: 10 s of 340 x 256 at 30 fps,
    about a megabyte with libx264's defaults."""
    folder = Path("data/kinetics_like")
    if not given and not folder.is_dir():
        with writable(folder):
            unfinished = folder.with_name(folder.name + ".unfinished")  # complete or not at all
            unfinished.mkdir(parents=True, exist_ok=True)
            for i in tqdm(range(4), desc=f"writing videos to {folder}", unit="video"):
                # With mbtree the options are libx264's defaults.
                write_video(unfinished / f"{i}.mp4", kinetics_like(generator_of(0, i)), fps=30, options={"mbtree": "1"})
            unfinished.rename(folder)
    return list_videos(given or folder)


def read_straightforwardly(path, clips, size):
    """What one would write first: decode the whole file once, every frame to RGB, then index, crop and resize floats.

    The same clips as from `read_clips`, as float (R, T, 3, H, W).
    """
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        times, frames = zip(*((frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)))
    shown, out = np.array(times) - times[0], []  # (n,) s
    for clip in clips:
        video = torch.from_numpy(np.stack([frames[i] for i in shown_at(clip.times(shown), shown)])).permute(0, 3, 1, 2)  # (T, 3, h, w)
        height, width = video.shape[2:]
        (x, y, w, h), flip = clip.box(width, height)
        x, y, w, h = round(x * width), round(y * height), round(w * width), round(h * height)
        video = F.interpolate(video[:, :, y:y + h, x:x + w].float(), size=size, mode="bilinear")  # (T, 3, H, W)
        out.append(video.flip(-1) if flip else video)
    return torch.stack(out)


def time_file(path, args):
    """Clips/s of both ways on one file, taken in turn: (ours, straightforward)."""
    times = {read_clips: [], read_straightforwardly: []}
    for attempt in range(1 + args.rounds):
        for read in times:
            # The same clips for both.
            clips = [RandomClip(generator_of(0, attempt, repeat), args.frames, args.stride) for repeat in range(args.repeat)]
            times[read].append(timed(lambda: read(path, clips, args.size), torch.device("cpu")))
    return [args.repeat / statistics.median(taken[1:]) for taken in times.values()]  # the first round warms up


def loaded_batches(videos, args, noise, batch_size, steps, workers, device):
    """Yields that many batches of training clips, as train.py loads them, with a progress bar."""
    clips = VideoClips(videos, seed=0, repeat=args.repeat, frames=args.frames, stride=args.stride, size=args.size, noise=noise)
    batches = clip_batches(clips, StepSampler(range(steps), batch_size, 1, 0, 1), workers, device, timeout=300)
    with data_errors_explained(lambda: [f"some of {len(videos)} videos"]):
        yield from tqdm(batches, desc=f"loading, {workers} worker(s)", unit="batch", total=steps, dynamic_ncols=True)


def time_workers(videos, args, workers, warm=8, counted=32):
    """Clips/s out of a DataLoader that nobody keeps waiting."""
    for number, _ in enumerate(loaded_batches(videos, args, None, 1, warm + counted, workers, torch.device("cpu")), start=1):
        if number == warm:
            begin = time.perf_counter()
    return counted * args.repeat / (time.perf_counter() - begin)


def loading(args):
    """--loader: heading and rows."""
    videos, rows = find_videos(args.loader), []
    chosen = sorted({int(i) for i in np.linspace(0, len(videos) - 1, 16)})  # of a large folder, sixteen spread over it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for path in tqdm([videos[i] for i in chosen], desc="reading", unit="file", dynamic_ncols=True):
        try:
            ours, plain = time_file(path, args)
        except (BadVideo, av.FFmpegError, ValueError, TypeError) as error:  # the straightforward way needs frames, and their times
            print(f"left out: {path}: {type(error).__name__}: {error}")
            continue
        rows.append(dict(path=path, name=Path(path).name, megabytes=Path(path).stat().st_size / 1e6, clips_per_s=ours,
                         straightforward_clips_per_s=plain, ratio=ours / plain))
    torch.set_num_threads(threads)
    if not rows:
        raise InputError(f"--loader {args.loader}: none of the {len(chosen)} files tried can be read both ways; give another folder")
    rates = [time_workers(videos, args, workers) for workers in (1, 2)]
    heading = [f"{args.repeat} x ({args.frames} frames, stride {args.stride:g}) at {args.size[0]} x {args.size[1]} from each file, "
               f"on one core, PyAV {av.__version__}; median of {args.rounds} rounds, both ways in turn. "
               "Straightforward: decode the whole file once, every frame to RGB, index, crop, `F.interpolate`.",
               f"Ratio: {statistics.median(row['ratio'] for row in rows):.2f}x, median over the files. "
               f"A DataLoader gives {rates[0]:.1f} clips/s with 1 worker, {rates[1]:.1f} with 2."]
    return heading, LOADING, [row | dict(clips_per_s_1_worker=rates[0], clips_per_s_2_workers=rates[1]) for row in rows]


# ------------------------------------------------------------------------------------- loading + computing

LEAST = 5  # s of computing to measure per row, with loading beside it


def with_loading(row, videos, workers):
    """Train on clips from files: (clips/s, share of the time that the device stood still because there was no data)."""
    run, warm = row.run, 2 * max(1, workers)  # until the batches fetched ahead are used up
    steps = max(run.args.rounds, math.ceil(LEAST / statistics.median(row.times)))
    batches = loaded_batches(videos, run.args, (run.args.strategy, run.model.encoder.grid), row.videos, warm + steps, workers, run.device)
    copies = torch.cuda.Stream() if run.device.type == "cuda" else None
    skipped, ends, idle = Skipped(videos, run.machine), [mark(run.device)], []
    for batch in batches:
        skipped.note(batch)
        video, noise = to_device(batch, ("video", "noise"), run.device, copies)
        begin = mark(run.device)
        run.step(row.loss_function, video, noise)
        idle.append(elapsed(ends[-1], begin))  # waits for the step before, so that we are never more than one ahead of a GPU
        ends.append(mark(run.device))
    total = elapsed(ends[warm], ends[-1])
    return steps * row.clips / total, sum(idle[warm:]) / total


# ------------------------------------------------------------------------------------------- the miniature

# The paper's findings in small, on the generated videos. What differs from `python train.py` without data, by the setting's name:
FLAGS = {
    "mae": "",
    "ratio-0.75": "--mask-ratio 0.75", "ratio-0.9": "--mask-ratio 0.9", "ratio-0.95": "--mask-ratio 0.95",
    "tube": "--strategy tube", "frame": "--strategy frame", "block": "--strategy block",
    "norm-pix": "--norm-pix",
    # As many clips at the same rate:
    "repeat-1": "--repeat 1 --batch-size 32 --lr 0.096", "repeat-2": "--repeat 2 --batch-size 16 --lr 0.192",
}
# Another task on the same videos, told by looks: the colour of the shapes. As the demos do it, on as many clips as pre-training sees.
SUPERVISED = ("finetune.py --scratch --data data/moving_shapes/train_colours.csv --val data/moving_shapes/val_colours.csv --steps 750 "
              + in_flags({key: DEMO[key] for key in ("model", "frames", "stride", "size", "patch")}
                         | {key: value for key, value in finetune.DEMO.items() if key not in ("per_class", "steps", "save_every", "flip")}))
PER_CLASS = 3, 5, 10  # labels of each class to fine-tune with; for settings not in AT_ALL_LABELS the middle one
AT_ALL_LABELS = {"mae": f"MAE as in the demo: {DEMO['mask_ratio']:.0%} hidden, agnostic, raw pixels, repeat {DEMO['repeat']}",
                 "scratch": "none, from scratch", "colours": "supervised: colour of the shapes"}


def miniature_runs(args):
    """The runs as dicts (setting, seed, labels, steps, demos, command): all pre-trainings, and all that is fine-tuned from them."""
    demos = zlib.crc32(json.dumps([DEMO, finetune.DEMO]).encode())  # what the commands leave to the scripts
    folder, tail = f"runs/miniature-{demos:x}", "" if args.device == "auto" else f" --device {args.device}"
    if args.jobs > 1:
        tail += " --workers 0"
    if args.steps:
        folder, tail = f"{folder}-{args.steps}-steps", f"{tail} --steps {args.steps}"
    pretrainings, finetunings = [], []
    for seed in range(args.seeds):
        for setting in AT_ALL_LABELS | FLAGS:
            out, line = f"{folder}/{setting}-{seed}", dict(setting=setting, seed=seed, labels=None, steps=args.steps, demos=demos)
            if setting != "scratch":
                script = SUPERVISED if setting == "colours" else f"train.py {FLAGS[setting]}"
                pretrainings.append(line | dict(command=f"{script}{tail} --seed {seed} --out {out}"))
            start = "--scratch" if setting == "scratch" else f"--init {out}/last.pt --no-compare"
            for n in PER_CLASS if setting in AT_ALL_LABELS else PER_CLASS[1:2]:
                command = f"finetune.py {start} --per-class {n}{tail} --seed {seed} --out {out}-{8 * n}"
                finetunings.append(line | dict(labels=8 * n, command=command))
    return pretrainings, finetunings


def run_of(line):
    """What a line of the file is about: runs that differ only in threads and folders are the same; with other demos they are not."""
    return tuple(line.get(key) for key in ("setting", "labels", "seed", "steps", "demos"))


def run_one(line, done, args):
    """Run the command of a line; if it ends well, and FILE has no such line yet, append the line with what came out."""
    command, out = line["command"].split(), Path(line["command"].split("--out ")[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    resumed, began = (out / "last.pt").exists(), time.perf_counter()
    process = [sys.executable, str(Path(__file__).with_name(command[0])), *command[1:]]
    environment = os.environ | ({} if args.jobs == 1 else {"OMP_NUM_THREADS": "1"})
    with open(f"{out}.txt", "w") as said:
        status = subprocess.run(process, stdout=said, stderr=subprocess.STDOUT, env=environment).returncode
    if status:
        raise InputError(f"python {line['command']}\nended with status {status}; {out}.txt has what it said. What has ended well is kept")
    if run_of(line) in done:  # a pre-training that was needed again
        return
    logged = [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]
    rows, results = [row for row in logged if "loss" in row], [row for row in logged if "views" in row]
    line |= dict(loss=statistics.mean(row["loss"] for row in rows[-50:]),
                 clips_per_s=statistics.median(row["clips_per_s"] for row in rows))
    if results:
        line |= dict(videos=results[-1]["videos"], top1=results[-1]["val_acc1"])
    line |= dict(seconds=None if resumed else time.perf_counter() - began,
                 jobs=args.jobs, torch=torch.__version__, machine=args.machine)
    finetune.add_line(args.miniature, json.dumps(line) + "\n")
    print(f"{line['setting']}, {line['labels'] or 'no'} labels, seed {line['seed']}: loss {line['loss']:.4f}"
          + (f", top-1 {line['top1']:.1f} %" if "top1" in line else ""), flush=True)


def read_lines(file):
    """The lines of FILE, which is made if it is not there."""
    try:
        with writable(f"--miniature {file}"), open(file, "a+") as lines:
            lines.seek(0)
            return [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(f"--miniature {file}: a line is no JSON ({error}); take it out, and its run is done again") from error


def miniature(args):
    """--miniature FILE: run what FILE has no line of yet, then heading, columns and rows: top-1 and its spread over the seeds."""
    device = start(args.device).device
    args.machine = name_of(device)
    args.jobs = args.jobs or (1 if device.type == "cuda" else available_cpus())
    (pretrainings, finetunings), done = miniature_runs(args), {run_of(line) for line in read_lines(args.miniature)}
    wanted = {run_of(line) for line in pretrainings + finetunings}
    print(f"{len(wanted)} runs, {len(wanted & done)} of them in {args.miniature}; {args.jobs} at a time")
    if wanted - done:
        generate_videos("data/moving_shapes")
    tunings = [line for line in finetunings if run_of(line) not in done]
    needed = {(line["setting"], line["seed"]) for line in tunings}  # also if done: where its folder still is, that takes seconds
    trainings = [line for line in pretrainings if run_of(line) not in done or (line["setting"], line["seed"]) in needed]
    with ThreadPoolExecutor(args.jobs) as pool:  # after an error or Ctrl-C nothing more is begun; what is under way saves and ends
        for phase in (trainings, tunings):
            list(pool.map(lambda line: run_one(line, done, args), phase))
    lines = [line for line in read_lines(args.miniature) if run_of(line) in wanted]
    heading = (f"Top-1 on {max(line.get('videos', 0) for line in lines)} videos, mean and standard deviation of {args.seeds} seeds; "
               "chance is 12.5 %. Speed: clips/s of pre-training, loading included, relative to the first row.")
    columns = {"pre-training": "{name}"} | {f"{8 * n} labels": f"{{labels_{8 * n}}}" for n in PER_CLASS} | {"speed": "{speed}"}
    return [heading], columns, [summary(setting, lines) for setting in AT_ALL_LABELS | FLAGS]


def summary(setting, lines):
    """A row of the miniature's table, every cell as it is printed."""
    def of(key, setting, labels):
        return [line[key] for line in lines if (line["setting"], line["labels"]) == (setting, labels)]

    row = dict(name=AT_ALL_LABELS.get(setting) or FLAGS[setting])
    for labels in (8 * n for n in PER_CLASS):
        found = of("top1", setting, labels)
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        row[f"labels_{labels}"] = f"{statistics.mean(found):.1f}{spread}" if found else ""
    ours, first = of("clips_per_s", setting, None), of("clips_per_s", "mae", None)
    known = ours and first and setting in FLAGS and len({(line["machine"], line["jobs"]) for line in lines}) == 1
    row["speed"] = f"{statistics.median(ours) / statistics.median(first):.2f}x" if known else ""
    return row


# --------------------------------------------------------------------------------------- tables and chart

ARITHMETIC = {"hidden": "{name}", "visible tokens": "{visible_tokens}",
              "GMACs, encoder + decoder": "{gmacs_encoder:.4g} + {gmacs_decoder:.4g}", "predicted speedup": "{predicted_speedup:.2f}x"}
AS_PAPER = {"sum": "{gmacs:.1f}", "sum, all patches embedded": "{gmacs_as_paper:.1f}"}
MEASURED = {"clips a step": "{clips}", "step, ms": "{step_ms:.0f} ({step_ms_min:.0f} to {step_ms_max:.0f})", "clips/s": "{clips_per_s:.3g}",
            "speedup": "{speedup:.2f}x", "measured / predicted": "{measured_over_predicted:.2f}", "TFLOP/s": "{tflops:.3g}",
            "of matrix product": "{share_of_product:.0%}"}
MEMORY = {"peak memory": "{peak_mem_gb:.1f} GB"}
LOADED = {"load + compute, clips/s": "{load_compute_clips_per_s:.3g}", "load + compute, speedup": "{load_compute_speedup:.2f}x",
          "waiting for data": "{data_wait:.0%}"}
LOADING = {"file": "{name}", "MB": "{megabytes:.2f}", "clips/s": "{clips_per_s:.1f}",
           "straightforward": "{straightforward_clips_per_s:.1f}", "ratio": "{ratio:.2f}x"}
PROFILE = {"kernel": "{name}", "ms a step": "{ms:.3f}", "share": "{share:.1%}", "calls": "{calls:g}", "matrix": "{matrix}"}


def markdown(columns, rows):
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1)] + [[cell.format(**row) for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PAPER = {"predicted_speedup": 7.7, "speedup": 5.8, "load_compute_speedup": 4.1}  # Table 1: ViT-L, 90 % hidden


def chart(rows):
    """Speedup against masking ratio as SVG, in colours that show on light and on dark pages. Rings: the paper's, where the
    row of 90 % has the arithmetic of its ViT-L."""
    rows = sorted((row for row in rows if not row["dense"]), key=lambda row: row["mask_ratio"])
    series = [("predicted", "predicted_speedup", "#888"), ("compute", "speedup", "#3584e4"),
              ("load + compute", "load_compute_speedup", "#e0701a")]
    series = sorted((line for line in series if line[1] in rows[0]), key=lambda line: -rows[-1][line[1]])
    paper_row = next((row for row in rows if row["mask_ratio"] == 0.9 and round(row["gmacs_as_paper"], 1) == 81.6), None)
    top = 1.08 * max(row[key] for row in rows for _, key, _ in series)
    low, high = rows[0]["mask_ratio"], rows[-1]["mask_ratio"]
    across = [70 + 400 * (row["mask_ratio"] - low) / (high - low or 1) for row in rows]
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 380" font-family="sans-serif" font-size="14" fill="#888">',
           '<text x="14" y="24">speedup over the dense encoder</text><text x="270" y="366" text-anchor="middle">tokens hidden</text>']
    step = next(step for step in (0.5, 1, 2, 5, 10, 20, 50, 100, 1000) if top / step <= 8)
    for tick in range(int(top / step) + 1):
        y = 320 - 280 * tick * step / top
        out.append(f'<path d="M55 {y:.1f}H485" stroke="#888" stroke-opacity="0.35"/>'
                   f'<text x="48" y="{y + 5:.1f}" text-anchor="end">{tick * step:g}x</text>')
    out += [f'<text x="{x:.1f}" y="342" text-anchor="middle">{row["name"]}</text>' for x, row in zip(across, rows)]
    name_at = 0
    for name, key, colour in series:
        points = [(x, 320 - 280 * row[key] / top) for x, row in zip(across, rows)]
        dashes, line = ' stroke-dasharray="6 5"' if name == "predicted" else "", " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5"{dashes}/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points]
        if paper_row:
            x, y = across[rows.index(paper_row)], 320 - 280 * PAPER[key] / top
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="none" stroke="{colour}" stroke-width="2"/>')
        name_at = max(name_at + 18, points[-1][1] + 5)  # beside the last point, and never on another name
        out.append(f'<text x="484" y="{name_at:.1f}" fill="{colour}">{name} {rows[-1][key]:.1f}x</text>')
    if paper_row:
        out.append('<text x="500" y="342">rings: the paper</text>')
    return "\n".join([*out, "</svg>", ""])


# -------------------------------------------------------------------------------------------------- the run


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.backends.cpu.get_cpu_capability()}"


def headline(args):
    """What computes, and how, for a heading."""
    return f"{args.device}; {args.amp}, {'compiled' if args.compile else 'not compiled'}, torch {torch.__version__}."


def describe(args, model):
    """The model and its input, for a heading."""
    (frames, height, width), patch = model.encoder.video_size, "x".join(map(str, args.patch))
    part = "" if args.decode_ratio == 1 else f", {args.decode_ratio:.4g} of the hidden tokens decoded (dense: all)"
    return (f"Model {args.model}, decoder {model.decoder_embed.out_features} x {len(model.decoder_blocks)}{part}; "
            f"{frames} frames of {height} x {width}, patch {patch}; {args.strategy} masks.")


def flops(args):
    """--flops: heading, columns and rows."""
    model = make_model(args, "meta")
    note = ("Forward multiply-adds of one clip as we run it, only visible patches embedded; "
            "last column: all of them, as in Table 1 of the paper.")
    return [describe(args, model), note], ARITHMETIC | AS_PAPER, arithmetic(model, args)


def speed(args):
    """The table of steps, with --end-to-end also its last columns: heading, columns and rows."""
    machine = start(args.device)
    run = Run(args, machine)
    rows = [Row(run, line) for line in arithmetic(run.model, args)]
    videos = None if args.end_to_end is None else find_videos(args.end_to_end)
    product = measure(run, rows)
    table, columns = results(rows, product), ARITHMETIC | MEASURED | (MEMORY if run.device.type == "cuda" else {})
    heading = [
        f"{headline(args)} {describe(args, run.model)}",
        f"A step is forward, backward, clipping and AdamW on random video. "
        f"Batch: {f'{args.batch_size} videos' if args.batch_size else 'grows with the ratio'}, clips from each: {args.repeat}. "
        f"Times: median (least to most) of {args.rounds} rounds through all rows. TFLOP/s: a step counted as three forward passes; "
        f"a matrix product reaches {product:.3g}. Dense: the encoder sees a learned token for each hidden one."]
    if videos:
        workers, reason = choose_workers(args.workers, machine.device, 1)
        for line, row in zip(table, rows):
            line["load_compute_clips_per_s"], line["data_wait"] = with_loading(row, videos, workers)
            line["load_compute_speedup"] = line["load_compute_clips_per_s"] / table[0]["load_compute_clips_per_s"]
        heading.append(f"Load + compute: the same step, row after row, on clips of {len(videos)} videos, stride {args.stride:g}; "
                       f"data workers: {workers} ({reason}).")
        columns |= LOADED
    return heading, columns, table


def parse_arguments(argv=None):
    parser = Parser(__doc__.split("\n\n")[0])
    what = parser.add_argument_group("what to measure (default: the table of steps)").add_mutually_exclusive_group()
    what.add_argument("--flops", action="store_true", help="only the arithmetic")
    what.add_argument("--loader", metavar="FOLDER", nargs="?", const="", help="only reading clips; generated files without a folder")
    what.add_argument("--end-to-end", metavar="FOLDER", nargs="?", const="", help="also load + compute; generated files without a folder")
    what.add_argument("--profile", metavar="RATIO", type=float, nargs="?", const=0.9, help="where a step's time goes, at this ratio (0.9)")
    what.add_argument("--miniature", metavar="FILE", help="the paper's findings in small; every run that ends adds its line to FILE")
    model = parser.add_argument_group("model and input")
    model.add_argument("--model", choices=SIZES, help="size (default: large, on a CPU small)")
    model.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75, 0.9, 0.95], help="shares of the tokens hidden, one row each")
    model.add_argument("--strategy", choices=STRATEGIES, default="agnostic", help="what is hidden together")
    model.add_argument("--decoder-width", type=whole, help="default: the model's, 512 from base on")
    model.add_argument("--decoder-depth", type=whole, help="blocks (default: the model's, 4 from small on)")
    model.add_argument("--decode-ratio", type=between(0.01, 1), default=1.0, help="share of the hidden tokens that is decoded (dense: all)")
    model.add_argument("--frames", type=whole, default=16, help="frames of a clip")
    model.add_argument("--size", type=square, default=(224, 224), help="height and width of a clip, in pixels: 224 or 192x256")
    model.add_argument("--patch", type=three_sizes, default=(2, 16, 16), help="frames x height x width of a patch")
    step = parser.add_argument_group("step")
    step.add_argument("--batch-size", type=whole, help="videos a step (default: per row, by memory on a GPU, by time on a CPU)")
    step.add_argument("--repeat", type=whole, help="clips per video (default: 4 where videos are read, else 1)")
    step.add_argument("--rounds", type=whole, default=5, help="measurements of each row or file")
    step.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    step.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="reduced precision")
    step.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)")
    data = parser.add_argument_group("loading")
    data.add_argument("--stride", type=positive, default=4, help="time between frames, in thirtieths of a second")
    data.add_argument("--workers", type=between(0, 1024, int), help="data worker processes of --end-to-end (default: from the CPUs)")
    small = parser.add_argument_group("miniature")
    small.add_argument("--seeds", type=whole, default=3, help="runs of each setting")
    small.add_argument("--jobs", type=whole, help="runs side by side, each with one thread (default: one per CPU; on a GPU one)")
    small.add_argument("--steps", type=whole, help="optimizer steps of every run, to try it out (default: the scripts' own)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write every row with all settings")
    output.add_argument("--chart", metavar="FILE.svg", help="draw speedup against masking ratio")
    args = parser.parse_args(argv)
    if args.chart and (args.loader is not None or args.miniature or args.profile is not None):
        raise InputError("--chart draws speedup against masking ratio, of which --loader, --profile and --miniature have none; "
                         "leave one of the two out")
    gpu = args.device != "cpu" and torch.cuda.is_available()
    args.model = args.model or ("large" if gpu or args.flops else "small")
    args.ratios = sorted(set(args.ratios))
    args.repeat = args.repeat or (1 if args.loader is None and args.end_to_end is None else 4)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what train.py prints is no part of the table
            command = (flops if args.flops else miniature if args.miniature else profile if args.profile is not None else
                       loading if args.loader is not None else speed)
            heading, columns, rows = command(args)
    except torch.OutOfMemoryError as error:
        raise InputError("out of memory while measuring; give a smaller --batch-size, --model or --size") from error
    print("\n\n".join([*heading, markdown(columns, rows)]))
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "chart")} | dict(torch=torch.__version__)
    if args.json:
        with writable(f"--json {args.json}"):
            Path(args.json).write_text(json.dumps([settings | row for row in rows], indent=1) + "\n")
    if args.chart:
        with writable(f"--chart {args.chart}"):
            Path(args.chart).write_text(chart(rows))
    return 0


if __name__ == "__main__":
    run_script(main)
