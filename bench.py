"""Measure what masking saves on this machine, beside the arithmetic that predicts it.

    python bench.py                              the table: dense, then 50, 75, 90 and 95 % hidden
    python bench.py --flops --model huge         the arithmetic alone, at once
    python bench.py --loader my_videos           reading clips alone, beside the straightforward way
    python bench.py --end-to-end my_videos       computing, and loading + computing: Table 1 of the paper in full

Tables go to stdout as Markdown, everything else to stderr.
From top to bottom: the arithmetic, the dense baseline, timing a step, loading, both together, tables and chart, the run.
"""

import argparse
import contextlib
import json
import math
import shutil
import statistics
import sys
import time
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from mae_st import SIZES, STRATEGIES, MaskedAutoencoder, mask_noise, normalise, small_normal, split_tokens, take
from train import (BadVideo, InputError, Parser, RandomClip, Skipped, StepSampler, VideoClips, between, choose_precision, choose_workers,
                   clip_batches, decay_groups, list_videos, numbers, positive, random, read_clips, run_script, shown_at, square, start,
                   to_device, update, whole, write_video)


def say(*words):
    tqdm.write(" ".join(str(word) for word in words), file=sys.stderr)


# ------------------------------------------------------------------------------------------- the arithmetic

DENSE_RATIO = 0.9  # of the dense row: Table 1 compares both encoders at 90 %


def linear_weights(module):
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def block_macs(blocks, tokens, dim):
    """Every weight is used once per token; q k^T, and the attention times v, take tokens^2 * dim each."""
    return linear_weights(blocks) * tokens + len(blocks) * 2 * tokens**2 * dim


def multiply_adds(model, visible, hidden, *, dense=False, embedded=None):
    """Forward multiply-adds of one clip, (encoder, decoder): linear layers and attention, as the paper's counter counts.

    visible, hidden: tokens that are seen, and that are decoded and predicted. dense: the encoder sees both kinds.
    embedded: patches through the embedding, the visible ones unless given. With all of them embedded ViT-L comes
    to 628.5 G dense and 81.6 G sparse. Table 1 has 627.5 and 81.0; leaving out the last layer, width to pixels, would
    give 627.9 and 81.0.
    """
    encoder, width = model.encoder, model.decoder_embed.in_features
    seen = 1 + visible + (hidden if dense else 0)  # with the class token
    decoded = 1 + visible + hidden
    encoding = linear_weights(encoder.embed) * (visible if embedded is None else embedded) + block_macs(encoder.blocks, seen, width)
    decoding = (linear_weights(model.decoder_embed) * seen + block_macs(model.decoder_blocks, decoded, model.decoder_embed.out_features)
                + linear_weights(model.decoder_pred) * hidden)
    return encoding, decoding


def arithmetic(model, args):
    """The part of the rows that needs no measuring: dense first, then one row per ratio."""
    rows, grid = [], model.encoder.grid
    for dense, ratio in [(True, DENSE_RATIO)] + [(False, ratio) for ratio in args.ratios]:
        keep, hide = split_tokens(mask_noise(args.strategy, 1, grid), grid, ratio)
        visible, hidden = keep.shape[1], hide.shape[1]
        if not dense:
            hidden = max(1, round(hidden * args.decode_ratio))
        encoder, decoder = multiply_adds(model, visible, hidden, dense=dense)
        as_paper = sum(multiply_adds(model, visible, hidden, dense=dense, embedded=math.prod(grid)))
        rows.append(dict(dense=dense, mask_ratio=ratio, visible_tokens=math.prod(grid) if dense else visible,
                         gmacs=(encoder + decoder) / 1e9, gmacs_encoder=encoder / 1e9, gmacs_decoder=decoder / 1e9, gmacs_as_paper=as_paper / 1e9))
    for row in rows:
        row["predicted_speedup"] = rows[0]["gmacs"] / row["gmacs"]
        row["predicted_speedup_as_paper"] = rows[0]["gmacs_as_paper"] / row["gmacs_as_paper"]
    return rows


# --------------------------------------------------------------------------------------- the dense baseline


class WithDense(MaskedAutoencoder):
    """The model with a second way through it, the baseline of Table 1: hidden tokens are replaced by a learned token
    before the encoder, which then sees all of them. Same decoder, same loss, and the same weights, so the rows of the
    table share one model and its memory. Only visible patches are embedded here too: the rows differ in the encoder alone.
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


def build(args, device):
    """The model of these arguments, made on the device; "meta" gives its shapes alone."""
    height, width = args.size
    arguments = SIZES[args.model] | dict(frames=args.frames, height=height, width=width, patch=args.patch)
    decoder = dict(decoder_dim=args.decoder_width, decoder_depth=args.decoder_depth)
    arguments |= {key: value for key, value in decoder.items() if value is not None}
    try:
        with torch.device(device):
            return WithDense(**arguments)
    except ValueError as error:
        raise InputError(str(error)) from error


# ------------------------------------------------------------------------------------------- timing a step


def mark(device):
    """A point in time: on a GPU in its own queue of work, so that nothing is timed that is only queued."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(begin, end):
    """Between two marks. On a GPU this waits for the second one."""
    if isinstance(end, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def timed(work, device, times=1):
    """Seconds that one call of work() takes."""
    begin = mark(device)
    for _ in range(times):
        work()
    return seconds(begin, mark(device)) / times


class Run:
    """What the rows share: the device, the model, its optimizer, the random video."""

    def __init__(self, args, machine):
        self.args, self.machine, self.device = args, machine, machine.device
        self.dtype, reason = choose_precision(args.amp, self.device)
        self.compiled = self.device.type == "cuda" if args.compile is None else args.compile
        say(f"precision: {self.dtype or 'float32'} ({reason}); compile: {self.compiled} "
            f"({'as asked' if args.compile is not None else 'the default on a GPU' if self.compiled else 'gains nothing on a CPU'})")
        torch.manual_seed(0)
        self.model = build(args, self.device)
        self.optimizer = torch.optim.AdamW(decay_groups(self.model, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def step(self, loss_function, video, noise):
        """train.py's step: forward, backward, clipping, AdamW."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss = loss_function(video, noise)
        self.scaler.scale(loss).backward()
        update(self.optimizer, self.scaler, self.model.parameters(), 0.02, loss.detach())

    def videos_that_fit(self, row):
        """A batch for a row that should fit, a power of two. Running out of memory is caught all the same (`warm_up`)."""
        model, gpu = self.model, self.device.type == "cuda"
        # Half of a GPU goes to activations. On a CPU speed and not memory sets the limit: 0.75 GB keep the default to about two minutes.
        budget = torch.cuda.get_device_properties(self.device).total_memory / 2 if gpu else 0.75e9
        kept = 80 if self.dtype is None else 40  # bytes kept for the backward pass per token, block and unit of width, about
        encoder = len(model.encoder.blocks) * model.decoder_embed.in_features * row["visible_tokens"]
        decoder = len(model.decoder_blocks) * model.decoder_embed.out_features * math.prod(model.encoder.grid)
        videos = budget / (kept * (encoder + decoder) * self.args.repeat)
        return 2 ** max(0, math.floor(math.log2(videos)))


class Row:
    """One row while it is measured: its way through the model, its batch, its times."""

    def __init__(self, run, arithmetic):
        self.run, self.device = run, run.device
        self.dense, self.ratio = arithmetic["dense"], arithmetic["mask_ratio"]
        self.name = "dense" if self.dense else f"{self.ratio:.4g} hidden"
        self.videos = run.args.batch_size or run.videos_that_fit(arithmetic)
        self.times, self.memory, self.steps = [], None, 1
        extra = {} if run.args.decode_ratio == 1 else dict(decode_ratio=run.args.decode_ratio)

        def loss_function(video, noise):
            return run.model.dense(video, self.ratio, noise) if self.dense else run.model(video, self.ratio, noise, **extra)

        # dynamic=False: every row gets code for its own sizes. fullgraph=True: an error in place of a quiet return to eager.
        self.loss_function = torch.compile(loss_function, dynamic=False, fullgraph=True) if run.compiled else loss_function

    @property
    def clips(self):
        return self.videos * self.run.args.repeat

    def step(self):
        args, grid = self.run.args, self.run.model.encoder.grid
        noise = mask_noise(args.strategy, self.clips, grid, device=self.device)
        self.run.step(self.loss_function, self.run.video[:self.clips], noise)


def random_video(clips, args, device):
    """uint8 (B, 3, T, H, W), in memory as the loader delivers it: a view of (B, T, H, W, 3)."""
    return torch.randint(256, (clips, args.frames, *args.size, 3), dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)


def warm_up(row):
    """The first steps, compiling included, none of them counted. False if memory ran out."""
    gpu = row.device.type == "cuda"
    try:
        first = once = timed(row.step, row.device)
        if gpu or row.run.compiled:
            once = timed(row.step, row.device)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
            once = timed(row.step, row.device, 3)
            row.memory = torch.cuda.max_memory_allocated() / 1e9
    except torch.OutOfMemoryError:
        return False  # the caller goes on once the exception, and the tensors it holds, are gone
    row.steps = max(1, math.ceil(0.5 / once))  # steps in one measurement: half a second, at least
    say(f"{row.name}: {row.clips} clips; first step {first:.1f} s{', compiling included' if row.run.compiled else ''}, not counted")
    return True


def fit(row):
    """Warm up; as long as memory runs out, halve the batch and say so."""
    while not warm_up(row):
        if row.videos == 1:
            raise InputError(f"out of memory at a single video of {row.clips} clips: choose a smaller --model, --size or --repeat")
        say(f"{row.name}: out of memory at {row.clips} clips; the batch is halved")
        row.videos //= 2
        row.run.optimizer.zero_grad(set_to_none=True)
        if row.device.type == "cuda":
            torch.cuda.empty_cache()


def matrix_product(device, dtype):
    """Seconds of a large product, as a function, and its TFLOP: what the device can reach."""
    side, times = (8192, 20) if device.type == "cuda" else (2048, 2)
    a, b = (torch.randn(side, side, device=device, dtype=dtype or torch.float32) for _ in range(2))
    return lambda: timed(lambda: a @ b, device, times), 2 * side**3 / 1e12


def measure(run, rows):
    """Times of all rows, taken in turn so that drift hits all alike; returns the matrix-product rate, TFLOP/s."""
    run.video = random_video(max(row.clips for row in rows), run.args, run.device)
    for row in rows:
        fit(row)
    product, tflop = matrix_product(run.device, run.dtype)
    product()
    times = []
    for _ in tqdm(range(run.args.rounds), desc="measuring", unit="round", dynamic_ncols=True):
        for row in rows:
            row.times.append(timed(row.step, row.device, row.steps))
        times.append(product())
    return tflop / statistics.median(times)


def results(rows, arithmetic, rate):
    """The rows of the table. The backward pass is counted as twice the forward pass."""
    table = []
    for row, known in zip(rows, arithmetic):
        step = statistics.median(row.times)
        table.append(known | dict(clips=row.clips, step_ms=step * 1e3, step_ms_min=min(row.times) * 1e3, step_ms_max=max(row.times) * 1e3,
                                  clips_per_s=row.clips / step, peak_mem_gb=row.memory))
    for row in table:
        row["speedup"] = row["clips_per_s"] / table[0]["clips_per_s"]
        row["measured_over_predicted"] = row["speedup"] / row["predicted_speedup"]
        row["tflops"] = row["gmacs"] * 2 * 3 * row["clips_per_s"] / 1e3
        row["matrix_product_tflops"], row["matrix_product_share"] = rate, row["tflops"] / rate
    return table


# -------------------------------------------------------------------------------------------------- loading


def kinetics_like(rng, frames=300, height=256, width=340):
    """Detailed texture under a moving camera, three things moving before it, and a camera's noise: uint8 (T, H, W, 3)."""
    def texture(h, w):
        layers = [torch.from_numpy(rng.normal(scale=22, size=(1, 3, cells, cells))) for cells in (3, 10, 30, 100)]  # coarse to fine
        return 127 + sum(F.interpolate(layer, size=(h, w), mode="bicubic") for layer in layers)[0].permute(1, 2, 0).numpy()

    def sway(room, period, phase):  # 0 to room and back
        return (room * (1 + np.sin(np.arange(frames) / period + phase)) / 2).astype(int)

    side = height // 3
    video, noise = np.empty((frames, height, width, 3), np.uint8), rng.uniform(4, 8)
    scene, (top, left) = texture(2 * height, 2 * width), (sway(room, rng.uniform(40, 80), rng.uniform(0, 6)) for room in (height, width))
    things = [(texture(side, side), *(sway(room - side, rng.uniform(15, 45), rng.uniform(0, 6)) for room in (height, width))) for _ in range(3)]
    for t in range(frames):
        picture = scene[top[t]:, left[t]:][:height, :width].copy()
        for thing, down, across in things:
            picture[down[t]:, across[t]:][:side, :side] = thing
        video[t] = (picture + rng.normal(scale=noise, size=picture.shape)).clip(0, 255)
    return video


def generated_folder(folder=Path("data/kinetics_like"), files=4):
    """Files like those of Kinetics: 10 s of 340 x 256 at 30 fps, libx264's defaults, about a megabyte. Complete or not at all."""
    if not folder.is_dir():
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for i in tqdm(range(files), desc=f"writing videos to {folder}", unit="video"):
            write_video(unfinished / f"{i}.mp4", kinetics_like(random(0, i)), fps=30)
        unfinished.rename(folder)
    return folder


def find_videos(folder, flag):
    """The videos of a folder or list, or generated ones where the flag came without."""
    try:
        return list_videos(folder or generated_folder())
    except InputError as error:
        raise InputError(str(error).replace("--data", flag)) from error


def read_straightforwardly(path, clips, size):
    """What one would write first: decode the whole file once, every frame to RGB, then index, crop, flip and resize floats.

    The same clips as `read_clips`, as float (R, 3, T, H, W).
    """
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        decoded = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    shown = np.array([at for at, _ in decoded]) - decoded[0][0]  # (n,) s
    out = []
    for clip in clips:
        video = torch.from_numpy(np.stack([decoded[i][1] for i in shown_at(clip.times(shown[-1]), shown)]))  # (T, H, W, 3)
        height, width = video.shape[1:3]
        (x, y, w, h), flip = clip.box(width, height)
        x, y, w, h = (round(share * length) for share, length in zip((x, y, w, h), (width, height, width, height)))
        video = video[:, y:y + h, x:x + w].permute(0, 3, 1, 2).float()  # (T, 3, h, w)
        video = F.interpolate(video, size=size, mode="bilinear")  # (T, 3, H, W)
        out.append((video.flip(-1) if flip else video).transpose(0, 1))
    return torch.stack(out)


def time_file(path, args):
    """Clips/s of both ways on one file, timed in turn: (ours, straightforward). Raises BadVideo."""
    times = {read_clips: [], read_straightforwardly: []}
    for attempt in range(1 + args.rounds):
        for read in times:
            clips = [RandomClip(random(0, attempt, repeat), args.frames, args.stride) for repeat in range(args.repeat)]  # the same for both
            begin = time.perf_counter()
            read(path, clips, args.size)
            times[read].append(time.perf_counter() - begin)
    return [args.repeat / statistics.median(taken[1:]) for taken in times.values()]  # the first only warmed up


def time_workers(videos, args, workers, samples=32):
    """Clips/s out of a DataLoader that nobody keeps waiting."""
    clips = VideoClips(videos, seed=0, repeat=args.repeat, frames=args.frames, stride=args.stride, size=args.size)
    warm = 4 * workers
    batches = clip_batches(clips, StepSampler(range(warm + samples), 1, 1, 0, 1), workers, torch.device("cpu"), timeout=300)
    for number, _ in enumerate(tqdm(batches, desc=f"{workers} worker(s)", unit="video", total=warm + samples, dynamic_ncols=True), start=1):
        if number == warm:
            begin = time.perf_counter()
    return samples * args.repeat / (time.perf_counter() - begin)


def loading(args):
    """--loader: the heading and the rows."""
    videos = find_videos(args.loader, "--loader")
    chosen = sorted({int(i) for i in np.linspace(0, len(videos) - 1, 16)})  # of a large folder, sixteen spread over it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for path in tqdm([videos[i] for i in chosen], desc="reading", unit="file", dynamic_ncols=True):
        try:
            ours, straightforward = time_file(path, args)
            rows.append(dict(path=path, megabytes=Path(path).stat().st_size / 1e6, clips_per_s=ours, straightforward_clips_per_s=straightforward,
                             ratio=ours / straightforward))
        except (BadVideo, av.FFmpegError, IndexError, TypeError) as error:  # the straightforward way trips over what ours puts right
            say(f"left out: {path}: {type(error).__name__}: {error}")
    torch.set_num_threads(threads)
    if not rows:
        raise InputError(f"--loader {args.loader}: none of the {len(chosen)} files tried can be read both ways; give another folder")
    with_workers = {f"clips_per_s_{workers}_workers": time_workers(videos, args, workers) for workers in (1, 2)}
    ratio = statistics.median(row["ratio"] for row in rows)
    heading = [f"{args.repeat} x ({args.frames} frames, stride {args.stride:g}) at {args.size[0]} x {args.size[1]} from each file, on one core, PyAV {av.__version__}; "
               f"median of {args.rounds} rounds, both ways in turn.",
               "Straightforward: one decode of the whole file, every frame to an RGB array, index, crop, bilinear `F.interpolate`.",
               f"Median ratio {ratio:.2f}x. DataLoader: " + ", ".join(f"{rate:.1f} clips/s with {workers} worker{'s'[:workers - 1]}"
                                                                    for workers, rate in zip((1, 2), with_workers.values())) + "."]
    return heading, [row | with_workers for row in rows]


# ------------------------------------------------------------------------------------- loading + computing


def with_loading(row, videos, workers):
    """Train on real clips: (clips/s, share of the time that the device had nothing to do because data was missing)."""
    run, args = row.run, row.run.args
    steps, warm = max(args.rounds, math.ceil(5 / statistics.median(row.times))), 2 * max(1, workers)  # until what was fetched ahead is used up
    clips = VideoClips(videos, seed=0, repeat=args.repeat, frames=args.frames, stride=args.stride, size=args.size,
                       noise=(args.strategy, run.model.encoder.grid))
    batches = clip_batches(clips, StepSampler(range(warm + steps), row.videos, 1, 0, 1), workers, run.device, timeout=300)
    copies = torch.cuda.Stream() if run.device.type == "cuda" else None
    skipped, end = Skipped(videos, run.machine), mark(run.device)
    for number, batch in enumerate(tqdm(batches, desc=f"{row.name}, loading", unit="step", total=warm + steps, dynamic_ncols=True), start=1):
        skipped.note(batch)
        video, noise = to_device(batch, run.device, copies)
        begin = mark(run.device)
        run.step(row.loss_function, video, noise)
        idle = seconds(end, begin)  # this also keeps us from running more than a step ahead of a GPU
        end = mark(run.device)
        if number <= warm:
            counted_from, waited = end, 0.0
        else:
            waited += idle
    total = seconds(counted_from, end)
    return steps * row.clips / total, waited / total


def add_loading(table, rows, videos, workers):
    for line, row in zip(table, rows):
        line["load_compute_clips_per_s"], line["data_wait"] = with_loading(row, videos, workers)
        line["load_compute_speedup"] = line["load_compute_clips_per_s"] / table[0]["load_compute_clips_per_s"]


# --------------------------------------------------------------------------------------- tables and chart

ARITHMETIC = {
    "hidden": lambda row: "dense" if row["dense"] else f"{100 * row['mask_ratio']:.4g} %",
    "visible tokens": lambda row: f"{row['visible_tokens']}",
    "GMACs encoder + decoder": lambda row: f"{row['gmacs_encoder']:.4g} + {row['gmacs_decoder']:.4g} = {row['gmacs']:.4g}",
    "predicted speedup": lambda row: f"{row['predicted_speedup']:.2f}x",
}
AS_PAPER = {
    "GMACs, all embedded": lambda row: f"{row['gmacs_as_paper']:.4g}",
    "predicted so": lambda row: f"{row['predicted_speedup_as_paper']:.2f}x",
}
MEASURED = {
    "clips a step": lambda row: f"{row['clips']}",
    "step, ms": lambda row: f"{row['step_ms']:.0f} ({row['step_ms_min']:.0f} to {row['step_ms_max']:.0f})",
    "clips/s": lambda row: f"{row['clips_per_s']:.3g}",
    "speedup": lambda row: f"{row['speedup']:.2f}x",
    "measured / predicted": lambda row: f"{row['measured_over_predicted']:.2f}",
    "peak memory": lambda row: "" if row["peak_mem_gb"] is None else f"{row['peak_mem_gb']:.1f} GB",
    "TFLOP/s": lambda row: f"{row['tflops']:.3g}",
    "of matrix product": lambda row: f"{row['matrix_product_share']:.0%}",
}
LOADED = {
    "load + compute, clips/s": lambda row: f"{row['load_compute_clips_per_s']:.3g}",
    "its speedup": lambda row: f"{row['load_compute_speedup']:.2f}x",
    "waiting for data": lambda row: f"{row['data_wait']:.0%}",
}
LOADING = {
    "file": lambda row: Path(row["path"]).name,
    "MB": lambda row: f"{row['megabytes']:.2f}",
    "clips/s": lambda row: f"{row['clips_per_s']:.1f}",
    "straightforward": lambda row: f"{row['straightforward_clips_per_s']:.1f}",
    "ratio": lambda row: f"{row['ratio']:.2f}x",
}


def markdown(columns, rows):
    lines = [list(columns), ["---"] + ["--:"] * (len(columns) - 1)] + [[show(row) for show in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def chart(rows):
    """Speedup against masking ratio as SVG, in colours that show on light and on dark pages."""
    series = [("predicted", "predicted_speedup", "#888"), ("compute", "speedup", "#3584e4"), ("load + compute", "load_compute_speedup", "#e0701a")]
    rows = sorted((row for row in rows if not row["dense"]), key=lambda row: row["mask_ratio"])
    series = [line for line in series if line[1] in rows[0]]
    top = 1.08 * max(row[key] for row in rows for _, key, _ in series)
    low, high = rows[0]["mask_ratio"], max(rows[-1]["mask_ratio"], rows[0]["mask_ratio"] + 1e-9)
    def x(ratio):
        return 70 + 400 * (ratio - low) / (high - low)
    def y(speedup):
        return 320 - 280 * speedup / top
    step = next(step for step in (0.5, 1, 2, 5, 10, 20, 50, 100, 1000) if top / step <= 8)
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 380" font-family="sans-serif" font-size="14" fill="#888">']
    for tick in range(int(top / step) + 1):
        at = y(tick * step)
        out.append(f'<path d="M55 {at:.1f}H485" stroke="#888" stroke-opacity="0.35"/><text x="48" y="{at + 5:.1f}" text-anchor="end">{tick * step:g}x</text>')
    out += [f'<text x="{x(row["mask_ratio"]):.1f}" y="342" text-anchor="middle">{100 * row["mask_ratio"]:.4g} %</text>' for row in rows]
    out.append('<text x="270" y="366" text-anchor="middle">tokens hidden</text><text x="14" y="24">speedup over the dense encoder</text>')
    below = 0
    for name, key, colour in sorted(series, key=lambda line: -rows[-1][line[1]]):
        points = [(x(row["mask_ratio"]), y(row[key])) for row in rows]
        dashes = ' stroke-dasharray="6 5"' if key == "predicted_speedup" else ""
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"{dashes}/>')
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>' for a, b in points]
        below = max(below + 18, points[-1][1] + 5)  # names stand beside the last points, never on one another
        out.append(f'<text x="492" y="{below:.1f}" fill="{colour}">{name} {rows[-1][key]:.1f}x</text>')
    return "\n".join([*out, "</svg>", ""])


# -------------------------------------------------------------------------------------------------- the run


def describe(args, model):
    """The first line of a heading: the model and its input."""
    frames, height, width = model.encoder.video_size
    decoder = f"decoder {model.decoder_embed.out_features} wide, {len(model.decoder_blocks)} deep"
    part = "" if args.decode_ratio == 1 else f" (dense aside, {args.decode_ratio:.4g} of the hidden tokens are decoded)"
    return f"{args.model.capitalize()}, {decoder}{part}; {frames} frames of {height} x {width}, patch {'x'.join(map(str, args.patch))}; {args.strategy} masks."


def flops(args):
    """--flops: the heading and the rows."""
    model = build(args, "meta")
    notes = "Forward multiply-adds of one clip. First what we run, visible patches embedded alone; then with all of them embedded, as in the paper's Table 1."
    return [describe(args, model), notes], arithmetic(model, args)


def speed(args):
    """The table itself, with --end-to-end also its last columns: the heading and the rows."""
    videos = None if args.end_to_end is None else find_videos(args.end_to_end, "--end-to-end")
    machine = start(args.device)
    args.model = args.model or ("large" if machine.device.type == "cuda" else "small")
    known = arithmetic(build(args, "meta"), args)  # wrong arguments are found before anything is measured
    run = Run(args, machine)
    rows = [Row(run, line) for line in known]
    rate = measure(run, rows)
    table = results(rows, known, rate)
    gpu = machine.device.type == "cuda"
    name = torch.cuda.get_device_name(machine.device) if gpu else f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    args.device, args.amp, args.compile = name, str(run.dtype or torch.float32).removeprefix("torch."), run.compiled  # what the rows report
    heading = [
        f"{name}; {args.amp}, {'compiled' if run.compiled else 'not compiled'}, torch {torch.__version__}. {describe(args, run.model)}",
        f"A step is forward, backward, clipping and AdamW on random video, {'the same batch in every row' if args.batch_size else 'the batch growing with the ratio'}, "
        f"{args.repeat} clips per video; median (minimum to maximum) of {args.rounds} interleaved rounds, after warm-up.",
        f"Dense: the encoder sees a learned token for each hidden one. TFLOP/s: three forward passes a step; a matrix product reaches {rate:.3g}."]
    if videos:
        workers, reason = choose_workers(args.workers, machine.device, 1)
        add_loading(table, rows, videos, workers)
        heading.append(f"Load + compute: the same step on clips of {len(videos)} videos, stride {args.stride:g}, {workers} data workers ({reason}).")
    return heading, table


def parse_arguments(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    what = parser.add_argument_group("what to measure (default: the table of steps)").add_mutually_exclusive_group()
    what.add_argument("--flops", action="store_true", help="only the arithmetic")
    what.add_argument("--loader", metavar="FOLDER", nargs="?", const="", help="only reading clips; generated files without a folder")
    what.add_argument("--end-to-end", metavar="FOLDER", nargs="?", const="", help="also loading + computing; generated files without a folder")
    model = parser.add_argument_group("model and input")
    model.add_argument("--model", choices=SIZES, help="size (default: large, on a CPU small)")
    model.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75, 0.9, 0.95], help="shares of the tokens that are hidden, one row each")
    model.add_argument("--strategy", choices=STRATEGIES, default="agnostic", help="what is hidden together")
    model.add_argument("--decoder-width", type=whole, help="default: the model's, 512 from base on")
    model.add_argument("--decoder-depth", type=whole, help="blocks (default: the model's, 4 from small on)")
    model.add_argument("--decode-ratio", type=between(0.01, 1), default=1.0, help="share of the hidden tokens that is decoded; the dense row decodes all")
    model.add_argument("--frames", type=whole, default=16, help="frames of a clip")
    model.add_argument("--size", type=square, default=(224, 224), help="height and width of a clip, in pixels: 224 or 192x256")
    model.add_argument("--patch", type=numbers((3,), "three sizes such as 2x16x16 (frames x height x width)"), default=(2, 16, 16), help="frames x height x width of a patch")
    step = parser.add_argument_group("step")
    step.add_argument("--batch-size", type=whole, help="videos a step (default: per row, what fits, by memory on a GPU and by time on a CPU)")
    step.add_argument("--repeat", type=whole, help="clips per video (default: 4 where videos are read, else 1)")
    step.add_argument("--rounds", type=whole, default=5, help="measurements of each row or file")
    step.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    step.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="reduced precision")
    step.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)")
    data = parser.add_argument_group("loading")
    data.add_argument("--stride", type=positive, default=4, help="time between frames, in thirtieths of a second")
    data.add_argument("--workers", type=between(0, 1024, int), help="data worker processes of --end-to-end (default: from the CPUs)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write every row with all settings")
    output.add_argument("--chart", metavar="FILE.svg", help="draw speedup against masking ratio")
    return parser.parse_args(argv)


def complete(args):
    """Check what argparse cannot, and fill in what depends on other arguments."""
    args.ratios = sorted(set(args.ratios))
    if len(args.ratios) > 7:
        raise InputError(f"--ratios: {len(args.ratios)} given, at most 7 are compared in one run (torch.compile keeps 8 versions)")
    if args.chart and args.loader is not None:
        raise InputError("--chart draws speedup against masking ratio, and --loader has none; leave one of the two out")
    for flag, name in (("--json", args.json), ("--chart", args.chart)):
        if name and not Path(name).parent.is_dir():
            raise InputError(f"{flag} {name}: there is no folder {Path(name).parent}; make it, or give another file")
    if args.flops:
        args.model = args.model or "large"
    args.repeat = args.repeat or (1 if args.loader is None and args.end_to_end is None else 4)


def write(flag, name, text):
    try:
        Path(name).write_text(text)
    except OSError as error:
        raise InputError(f"{flag} {name} cannot be written: {error.strerror}; give another file") from error


def main(argv=None):
    args = parse_arguments(argv)
    complete(args)
    with contextlib.redirect_stdout(sys.stderr):  # what train.py prints is no part of the table
        try:
            heading, rows = flops(args) if args.flops else loading(args) if args.loader is not None else speed(args)
        except torch.OutOfMemoryError as error:
            raise InputError("out of memory while measuring: give a smaller --batch-size, --model or --size") from error
        except ValueError as error:
            raise InputError(str(error)) from error
    if args.loader is not None:
        columns = LOADING
    else:
        columns = ARITHMETIC | (AS_PAPER if args.flops else MEASURED) | (LOADED if args.end_to_end is not None else {})
    print("\n\n".join([*heading, markdown(columns, rows)]))
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "chart")}
    if args.json:
        write("--json", args.json, json.dumps([settings | dict(torch=torch.__version__) | row for row in rows], indent=1) + "\n")
    if args.chart:
        write("--chart", args.chart, chart(rows))
    return 0


if __name__ == "__main__":
    run_script(main)
