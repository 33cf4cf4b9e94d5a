"""Measure what masking saves on this machine, beside the arithmetic that predicts it.

    python bench.py                            the table: dense, then 50, 75, 90 and 95 % hidden
    python bench.py --flops --model huge       the arithmetic alone
    python bench.py --loader my_videos         reading clips, beside the straightforward way
    python bench.py --end-to-end my_videos     computing, and loading + computing: Table 1 in full
    python bench.py --findings runs.jsonl      accuracy, from what the README's loop has written

Tables go to stdout as Markdown, everything else to stderr.
"""
import argparse
import contextlib
import json
import math
import os
import sys
from pathlib import Path
from statistics import median

from train import (DTYPES, BadVideo, InputError, Parser, RandomClip, VideoClips, batches_on_device,
                   between, build, chart, elapsed, generate_files, in_a_line, list_videos, mark,
                   read_clips, rng_of, run_script, setup, sizes, text, update, whole_file)

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from mae_st import (SIZES, STRATEGIES, MaskedAutoencoder, gather, mask_noise, normalise,
                    param_groups, random_masking, small_normal)

# --------------------------------------------------------------------------------- the arithmetic

def linear_macs(module, tokens):
    """Each weight of a linear layer is used once per token."""
    return sum(x.weight.numel() for x in module.modules() if isinstance(x, nn.Linear)) * tokens

def block_macs(blocks, tokens, dim):
    """Attention adds q k^T and its product with v, tokens^2 * dim each."""
    return linear_macs(blocks, tokens) + len(blocks) * 2 * tokens**2 * dim

def multiply_adds(model, visible, hidden, embedded, dense=False):
    """Forward multiply-adds of one clip in linear layers and attention: (encoder, decoder).

    visible: tokens of the encoder, which also sees the hidden ones if dense; hidden: tokens that
    are decoded; embedded: patches that are embedded. With all of them ViT-L takes 628.5 G dense and
    81.6 G at 90 %; Table 1, perhaps without the last layer, has 627.5 and 81.0."""
    seen, decoded = 1 + visible + dense * hidden, 1 + visible + hidden  # with the class token
    dim, decoder_dim = model.decoder_embed.in_features, model.decoder_embed.out_features
    encoder = linear_macs(model.encoder.patch_embed, embedded)
    encoder += block_macs(model.encoder.blocks, seen, dim)
    decoder = linear_macs(model.decoder_embed, seen) + linear_macs(model.decoder_pred, hidden)
    return encoder, decoder + block_macs(model.decoder_blocks, decoded, decoder_dim)

def arithmetic(model, args):
    """The columns of the table that need no measuring: a dense row, then one row per ratio."""
    rows, grid = [], model.encoder.grid
    for dense, ratio in [(True, 0.9)] + [(False, ratio) for ratio in args.ratios]:  # Table 1: 0.9
        with in_a_line("--ratios", ValueError):
            ids_keep, ids_mask = random_masking(mask_noise(args.strategy, 1, grid), grid, ratio)
        visible, hidden = ids_keep.shape[1], ids_mask.shape[1]
        decoded = hidden if dense else max(1, round(hidden * args.decode_ratio))
        encoder, decoder = multiply_adds(model, visible, decoded, visible, dense)
        as_paper = sum(multiply_adds(model, visible, decoded, math.prod(grid), dense))
        rows.append(dict(
            name="dense" if dense else f"{100 * ratio:.4g} %", dense=dense, mask_ratio=ratio,
            visible_tokens=visible + dense * hidden, gmacs_encoder=encoder / 1e9,
            gmacs_decoder=decoder / 1e9, gmacs=(encoder + decoder) / 1e9,
            gmacs_as_paper=as_paper / 1e9))
    return [row | dict(predicted_speedup=rows[0]["gmacs"] / row["gmacs"]) for row in rows]

# ----------------------------------------------------------------------------- the dense baseline

class WithDense(MaskedAutoencoder):
    """The model, and the baseline of Table 1: an encoder that sees a learned token for each hidden
    one. All else is the model's, so the rows of the table differ in the encoder alone."""

    def __init__(self, **model_args):
        super().__init__(**model_args)
        self.encoder_mask_token = small_normal(1, self.decoder_embed.in_features)

    def dense(self, video, mask_ratio, noise):
        """The loss, as `forward` gives it. Tokens in the order class, visible, hidden."""
        encoder, pos_embed = self.encoder, self.encoder.pos_embed()
        patches = encoder.patchify(video)  # (B, N, P)
        ids_keep, ids_mask = self.masking(patches, mask_ratio, noise)  # (B, K), (B, M)
        visible = encoder.patch_embed(normalise(gather(patches, ids_keep)))
        visible = visible + F.embedding(ids_keep, pos_embed)  # (B, K, D)
        hidden = self.encoder_mask_token + F.embedding(ids_mask, pos_embed)  # (B, M, D)
        cls = (encoder.cls_token + encoder.pos_embed_class).expand(len(patches), 1, -1)
        x = torch.cat([cls, visible, hidden], dim=1)  # (B, 1 + N, D)
        for block in encoder.blocks:
            x = block(x)
        rows = F.pad(torch.cat([ids_keep, ids_mask], dim=1) + 1, (1, 0))  # (B, 1 + N)
        x = self.decoder_embed(encoder.norm(x)) + F.embedding(rows, self.decoder_pos_embed)
        for block in self.decoder_blocks:
            x = block(x)
        prediction = self.decoder_pred(self.decoder_norm(x[:, -ids_mask.shape[1]:]))
        return self.loss(prediction, self.targets(patches, ids_mask)[0])

def make_model(args, device):  # "meta" gives its shapes alone
    given = dict(decoder_dim=args.decoder_width, decoder_depth=args.decoder_depth, patch=args.patch,
                 frames=args.frames, height=args.size[0], width=args.size[1])
    with torch.device(device):
        return build(WithDense, SIZES[args.model] | {key: x for key, x in given.items() if x})

# --------------------------------------------------------------------------------- timing a step

def timed(work, device, times=1):  # seconds of one call
    begin = mark(device)
    for _ in range(times):
        work()
    return elapsed(begin, mark(device)) / times

def make_run(args):
    """Model, optimizer and scaler, which all rows share."""
    torch.compiler.config.recompile_limit = 64  # every row is a version of one function
    torch.manual_seed(0)
    model = make_model(args, args.device)
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
    return argparse.Namespace(args=args, model=model, optimizer=optimizer, scaler=scaler)

def make_row(run, line):
    """A row of the table: its way through the model, its batch, its times."""
    args, ratio = run.args, line["mask_ratio"]

    def loss_of(video, noise):
        if line["dense"]:
            return run.model.dense(video, ratio, noise)
        return run.model(video, ratio, noise, args.decode_ratio)

    if args.compile:  # fullgraph: an error where something would stay uncompiled
        loss_of = torch.compile(loss_of, dynamic=False, fullgraph=True)
    videos = args.videos or videos_that_fit(run, line["visible_tokens"])
    return argparse.Namespace(line=line, videos=videos, loss_of=loss_of, times=[], memory=None)

def videos_that_fit(run, encoder_tokens):
    """A power of two that takes half of a GPU's memory, or 0.75 GB on a CPU. About 40 bytes per
    token, block and unit of width wait for the backward pass, 80 in float32."""
    model, gpu = run.model, run.args.device == "cuda"
    budget = torch.cuda.get_device_properties(0).total_memory / 2 if gpu else 0.75e9
    units = len(model.encoder.blocks) * model.decoder_embed.in_features * encoder_tokens
    units += len(model.decoder_blocks) * model.decoder_pos_embed.numel()
    clips = budget / (units * (40 if DTYPES[run.args.amp] else 80))
    return 2 ** max(0, math.floor(math.log2(clips / run.args.repeat)))

def step(run, row, video=None, noise=None):
    """The step of `train.fit`: forward, backward, clipping, AdamW. By default on random video."""
    args, dtype, grid = run.args, DTYPES[run.args.amp], run.model.encoder.grid
    if video is None:
        video = run.video[:row.videos * args.repeat]
        noise = mask_noise(args.strategy, len(video), grid, device=args.device)
    with torch.autocast(args.device, dtype, enabled=dtype is not None):
        loss = row.loss_of(video, noise.contiguous())
    run.scaler.scale(loss).backward()
    update(run.optimizer, run.scaler, run.model.parameters(), 0.02, loss.detach())

def warm_up(run, row):
    """The first steps, compiling included, do not count. While memory runs out, halve the batch."""
    args, gpu = run.args, run.args.device == "cuda"
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            first = once = timed(lambda: step(run, row), args.device)
            if gpu:
                torch.cuda.reset_peak_memory_stats()
                once = timed(lambda: step(run, row), args.device, 3)
                row.memory = torch.cuda.max_memory_allocated() / 1e9
            row.steps = max(1, math.ceil(0.5 / once))  # of one measurement: half a second
            return print(f"{row.line['name']}: the first step took {first:.1f} s, not counted")
        if row.videos == 1:  # outside of the exception, so that its tensors are free
            raise InputError("out of memory at one video: lower --model, --size or --repeat")
        row.videos //= 2
        print(f"{row.line['name']}: out of memory, so the batch is halved to {row.videos} videos")
        run.optimizer.zero_grad(set_to_none=True)
        run.optimizer.state.clear()  # which may be half made

def random_video(clips, args, device):  # (B, 3, T, H, W), as the loader's: of (B, T, H, W, 3)
    shape = clips, args.frames, *args.size, 3
    return torch.randint(256, shape, dtype=torch.uint8, device=device).permute(0, 4, 1, 2, 3)

def measure(run, rows):
    """Time all rows and a matrix product in turn, so that drift affects all. -> its TFLOP/s"""
    args = run.args
    run.video = random_video(max(row.videos for row in rows) * args.repeat, args, args.device)
    for row in rows:
        warm_up(run, row)
    side, products = 8192 if args.device == "cuda" else 2048, []
    a = torch.randn(side, side, device=args.device, dtype=DTYPES[args.amp])
    for _ in tqdm(range(1 + args.rounds), desc="measuring", unit="round", disable=None):
        products.append(timed(lambda: a @ a, args.device, times=4))
        for row in rows if len(products) > 1 else []:  # the first product warms up
            row.times.append(timed(lambda: step(run, row), args.device, row.steps))
    return 2 * side**3 / 1e12 / median(products[1:])

def results(run, rows, product):
    """The measured rows. product: TFLOP/s. The backward pass counts as two forward passes."""
    table = []
    for row in rows:
        clips, ms = row.videos * run.args.repeat, [1e3 * seconds for seconds in row.times]
        rate = clips / median(row.times)
        speedup = rate / (table[0]["clips_per_s"] if table else rate)
        tflops = row.line["gmacs"] * 2 * 3 * rate / 1e3
        table.append(row.line | dict(
            clips=clips, clips_per_s=rate, step_ms=median(ms), step_ms_max=max(ms), tflops=tflops,
            share_of_product=tflops / product, speedup=speedup, peak_mem_gb=row.memory,
            step_ms_min=min(ms), measured_over_predicted=speedup / row.line["predicted_speedup"]))
    return table

# ------------------------------------------------------------------- loading, alone and in a step

ALONE = "data/kinetics_like"  # the folder of a flag that comes without one; made if not there
LEAST = 5  # s to compute per row, with loading beside it

def kinetics_like(rng, frames=300, height=256, width=340):
    """Detailed texture under a moving camera with noise, as uint8 (T, H, W, 3)."""
    layers = (torch.from_numpy(rng.normal(0, 32, (1, 3, n, n))) for n in (3, 10, 30, 100))
    layers = (F.interpolate(x, size=(2 * height, 2 * width), mode="bicubic") for x in layers)
    scene = 127 + sum(layers)[0]  # (3, 2 H, 2 W)
    t, noise = np.arange(frames), rng.uniform(6, 10)
    y, x = (side * (1 + np.sin(t / rng.uniform(20, 60) + rng.uniform(0, 6))) / 2
            for side in (height, width))  # there and back again
    views = (scene[:, int(y[i]):, int(x[i]):][:, :height, :width].permute(1, 2, 0) for i in t)
    video = (view.numpy() + rng.normal(0, noise, (height, width, 3)) for view in views)
    return np.stack([frame.clip(0, 255).astype(np.uint8) for frame in video])

def find_videos(given):
    """Of a folder or list, or made: 10 s of 340 x 256, 30 fps, libx264's defaults, as Kinetics."""
    if given == ALONE:
        files = {f"{i}.mp4": (rng_of(0, i),) for i in range(4)}
        generate_files(given, kinetics_like, files, 30, preset="medium", mbtree="1")
    return list_videos(given)[0]

def read_straightforwardly(path, clips, size):
    """The same clips as one would write it first, as float (R, T, 3, H, W)."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        times, frames = zip(*((frame.time, frame.to_ndarray(format="rgb24"))
                              for frame in container.decode(stream)))
    shown, out = np.array(times) - times[0], []  # (n,) s
    for clip in clips:
        numbers = np.searchsorted(shown, clip.times(shown) + 1e-3, side="right") - 1
        video = torch.from_numpy(np.stack([frames[i] for i in numbers])).permute(0, 3, 1, 2)
        height, width = video.shape[2:]  # (T, 3, height, width)
        (x, y, w, h), flip = clip.box(width, height)
        top, left = round(y * height), round(x * width)
        video = video[:, :, top:top + round(h * height), left:left + round(w * width)].float()
        video = F.interpolate(video, size=size, mode="bilinear")  # (T, 3, H, W)
        out.append(video.flip(-1) if flip else video)
    return torch.stack(out)

def time_file(path, args):
    """Clips/s of both ways on one file, on the same clips in turn: [ours, straightforward]."""
    times = {read_clips: [], read_straightforwardly: []}
    for attempt in range(1 + args.rounds):  # the first one warms up
        for read in times:
            clips = [RandomClip(rng_of(0, attempt, r), args.frames, args.stride)
                     for r in range(args.repeat)]
            times[read].append(timed(lambda: read(path, clips, args.size), "cpu"))
    return [args.repeat / median(taken[1:]) for taken in times.values()]

def loading(args):
    """--loader: heading, columns and rows."""
    paths, rows = find_videos(args.loader), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    paths = paths[::math.ceil(len(paths) / 16)]
    for path in map(os.fsdecode, tqdm(paths, desc="reading", disable=None)):
        try:
            ours, plain = time_file(path, args)
        except (BadVideo, av.FFmpegError, ValueError, TypeError) as error:
            print(f"left out: {path}: {type(error).__name__}: {error}")
            continue
        rows.append(dict(path=path, name=Path(path).name, megabytes=os.path.getsize(path) / 1e6,
                         clips_per_s=ours, straightforward_clips_per_s=plain, ratio=ours / plain))
    torch.set_num_threads(threads)
    if not rows:
        raise InputError("--loader: none of the files tried can be read both ways")
    clip = f"({args.frames} frames of {args.size[0]} x {args.size[1]}, stride {args.stride:g})"
    return [f"{args.repeat} x {clip} from each file, on one core, PyAV {av.__version__}; beside "
            "decoding all to RGB, index, crop, `F.interpolate`; in the median "
            f"{median(row['ratio'] for row in rows):.2f}x."], LOADING, rows

def with_loading(run, row, paths):
    """Train on clips of files as train.py does: clips/s, and the share of time without data."""
    warm = 2 * max(1, run.args.workers)  # until the batches fetched ahead are used up
    steps = max(run.args.rounds, math.ceil(LEAST / median(row.times)))
    args = argparse.Namespace(**vars(run.args) | dict(
        steps=warm + steps + 1, accum=1, batch_size=row.videos))
    clips = VideoClips(paths, seed=0, repeat=args.repeat, frames=args.frames, stride=args.stride,
                       size=args.size, noise=(args.strategy, run.model.encoder.grid))
    batches, waits = batches_on_device(clips, args, 0, []), []
    batch = next(batches)
    for number in range(warm + steps):
        if number == warm:
            begin = mark(args.device)
        step(run, row, batch["video"], batch["noise"])
        free = mark(args.device)
        batch = next(batches)
        waits.append(elapsed(free, mark(args.device)))
    total = elapsed(begin, mark(args.device))
    return steps * row.videos * args.repeat / total, sum(waits[warm:]) / total

# ------------------------------------------------------------------------------ tables and charts

ARITHMETIC = {"hidden": "{name}", "visible tokens": "{visible_tokens}",
              "GMACs, encoder + decoder": "{gmacs_encoder:.4g} + {gmacs_decoder:.4g}",
              "predicted speedup": "{predicted_speedup:.2f}x"}
AS_PAPER = {"as Table 1": "{gmacs_as_paper:.1f}"}
MEASURED = {"clips a step": "{clips}",
            "step, ms": "{step_ms:.0f} ({step_ms_min:.0f} to {step_ms_max:.0f})",
            "clips/s": "{clips_per_s:.3g}", "speedup": "{speedup:.2f}x",
            "measured / predicted": "{measured_over_predicted:.2f}", "TFLOP/s": "{tflops:.3g}",
            "of matrix product": "{share_of_product:.0%}"}
LOADED = {"load + compute, clips/s": "{load_compute_clips_per_s:.3g}",
          "load + compute, speedup": "{load_compute_speedup:.2f}x",
          "waiting for data": "{data_wait:.0%}"}
LOADING = {"file": "{name}", "MB": "{megabytes:.2f}", "clips/s": "{clips_per_s:.1f}",
           "straightforward": "{straightforward_clips_per_s:.1f}", "ratio": "{ratio:.2f}x"}

def markdown(columns, rows):
    cells = [[cell.format(**row) for cell in columns.values()] for row in rows]
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def speed_chart(rows):
    """Speedup against masking ratio as SVG."""
    series = {"predicted": "predicted_speedup", "compute": "speedup",
              "load + compute": "load_compute_speedup"}
    rows = sorted((row for row in rows if not row["dense"]), key=lambda row: row["mask_ratio"])
    return chart("speedup over the dense encoder, by % of the tokens hidden", {
        f"{name} {rows[-1][key]:.1f}x": [(100 * row["mask_ratio"], row[key]) for row in rows]
        for name, key in series.items() if key in rows[0]})

def findings(args):
    """--findings: heading, columns and rows, one for all seeds of a run."""
    top1, seconds = {}, {}
    with in_a_line(f"--findings {args.findings}", OSError, ValueError, KeyError, TypeError):
        for line in map(json.loads, Path(args.findings).read_text().splitlines()):
            of = top1.setdefault(line["run"], {})  # number of labels -> top-1 of the seeds
            of.setdefault(line["per_class"], []).append(float(line["end"]["val_acc1"]))
            seconds.setdefault(line["run"], []).append(line["seconds"])
        counts = sorted({n for of in top1.values() for n in of})
    cell = lambda x: f"{np.mean(x):.1f} ({min(x):.1f}-{max(x):.1f})" if x else ""
    rows = [dict(name=name, minutes=np.mean(seconds[name]) / 60, top1=np.mean(of.get(10, 0)),
                 **{f"of_{n}": cell(of.get(n)) for n in counts}) for name, of in top1.items()]
    columns = {"run": "`{name}`", "minutes": "{minutes:.1f}"}
    columns |= {f"{n} labels": f"{{of_{n}}}" for n in counts}
    return ["Top-1 in %, mean (range) of the seeds, by labels a class."], columns, rows

def findings_chart(rows):  # of the runs named by a ratio, with 10 labels a class
    series = {}
    for row in sorted(rows, key=lambda row: row["minutes"]):
        if row["name"][:1] == "0" and row["top1"]:
            series.setdefault(row["name"].split("-")[0], []).append((row["minutes"], row["top1"]))
    if not series:
        raise InputError("--chart: no run is named by its ratio and has 10 labels a class")
    return chart("top-1 (%) against minutes of pre-training, by masking ratio", series)

# ----------------------------------------------------------------------------------- the commands

def describe(args, model):  # for the heading
    cpu = f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    video, patch = (" x ".join(map(str, size)) for size in (model.encoder.video_size, args.patch))
    return (f"{name}; precision {args.amp}, {'' if args.compile else 'not '}compiled; torch "
            f"{torch.__version__}. Model {args.model}, decoder {model.decoder_embed.out_features} "
            f"x {len(model.decoder_blocks)}; video {video}, patch {patch}; {args.strategy} masks, "
            f"{args.decode_ratio:g} of the hidden tokens decoded.")

def speed(args):
    """The table, with or without measuring and loading: heading, columns and rows."""
    if args.flops:
        model = make_model(args, "meta")
        note = "Forward multiply-adds of one clip; last column: all patches embedded (Table 1)."
        return [describe(args, model), note], ARITHMETIC | AS_PAPER, arithmetic(model, args)
    run = make_run(args)
    rows = [make_row(run, line) for line in arithmetic(run.model, args)]
    paths = find_videos(args.end_to_end) if args.end_to_end else None
    product = measure(run, rows)
    table, columns = results(run, rows, product), ARITHMETIC | MEASURED
    heading = [describe(args, run.model),
               f"Forward, backward, clipping and AdamW; median (least to most) of {args.rounds} "
               f"rounds. TFLOP/s: 3 forward passes a step; a matrix product reaches {product:.3g}."]
    columns |= {"peak memory": "{peak_mem_gb:.1f} GB"} if args.device == "cuda" else {}
    if paths is not None:
        for line, row in zip(table, rows):
            rate, line["data_wait"] = with_loading(run, row, paths)
            dense_rate = table[0].setdefault("load_compute_clips_per_s", rate)
            line |= dict(load_compute_clips_per_s=rate, load_compute_speedup=rate / dense_rate)
        heading.append(f"Load + compute: {len(paths)} videos, {args.workers} data workers.")
        columns |= LOADED
    return heading, columns, table

def parse_arguments(argv=None):
    parser = Parser(__doc__.split("\n\n")[0])
    add, whole, few = parser.add_argument, between(1, 1024, int), between(1, 65536, int)
    optional = dict(metavar="FOLDER", nargs="?", const=ALONE, type=text)
    add("--flops", action="store_true", help="only the arithmetic")
    add("--loader", **optional, help="only reading clips; alone: of generated files")
    add("--end-to-end", **optional, help="also load + compute; alone: on generated files")
    add("--findings", type=text, metavar="FILE", help="only the accuracy of runs")
    add("--model", choices=SIZES, help="size (large, on a CPU small)")
    add("--ratios", type=between(0, 1), nargs="+", default=[0.5, 0.75, 0.9, 0.95], help="hidden")
    add("--strategy", choices=STRATEGIES, default="agnostic", help="what is hidden together")
    add("--decoder-width", type=between(1, 8192, int), help="(the model's)")
    add("--decoder-depth", type=between(1, 256, int), help="blocks (the model's)")
    add("--decode-ratio", type=between(0.01, 1), default=1.0, help="share of hidden ones decoded")
    add("--frames", type=whole, default=16, help="of a clip")
    add("--size", type=sizes(2), default=(224, 224), help="height x width of a clip")
    add("--patch", type=sizes(3), default=(2, 16, 16), help="frames x height x width")
    add("--batch-size", type=few, dest="videos", help="videos a step (what fits, for each row)")
    add("--repeat", type=whole, help="clips per video (4 where videos are read, else 1)")
    add("--rounds", type=whole, default=5, help="measurements of each row or file")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="precision")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (on a GPU)")
    add("--stride", type=between(1e-12, 1e9), default=4.0, help="between frames, in 1/30 s")
    add("--workers", type=between(0, 256, int), help="data workers (from the CPUs)")
    add("--data-timeout", type=between(1, 86400, int), default=300, help="s to wait for a batch")
    add("--json", type=text, metavar="FILE", help="write every row with all settings")
    add("--chart", type=text, metavar="FILE.svg", help="draw the speedup, or the accuracy")
    args = parser.parse_args(argv)
    if args.chart and args.loader:
        parser.error("--chart draws what --loader does not measure")
    args.ratios = sorted(set(args.ratios))
    args.repeat = args.repeat or (4 if args.loader or args.end_to_end else 1)
    return args

def main(argv=None):
    args = parse_arguments(argv)
    with contextlib.redirect_stdout(sys.stderr):  # what is printed on the way is not the table
        setup(args)
        args.model = args.model or ("large" if args.device == "cuda" or args.flops else "small")
        command = findings if args.findings else loading if args.loader else speed
        heading, columns, rows = command(args)
    print("\n\n".join([*heading, markdown(columns, rows)]))
    settings = vars(args) | dict(torch=torch.__version__)
    if args.json:
        with whole_file(args.json) as path:
            path.write_text(json.dumps([settings | row for row in rows], indent=1) + "\n")
    if args.chart:
        with whole_file(args.chart) as path:
            path.write_text((findings_chart if args.findings else speed_chart)(rows))

if __name__ == "__main__":
    run_script(main)
