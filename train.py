"""Pre-train a spatiotemporal masked autoencoder on video files.

    python train.py                                    no data, no GPU: makes videos and learns them
    python train.py --data my_videos --model base      a folder, or a list of "path label" lines
    torchrun --nproc_per_node=8 train.py --data kinetics/train.csv        the paper's recipe
    python train.py --reconstruct clip.mp4 --init runs/pretrain/last.pt   look at a reconstruction
"""
import argparse
import contextlib
import errno
import fcntl
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

TORCH_CAME_FIRST = "torch" in sys.modules and "OMP_WAIT_POLICY" not in os.environ
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads must not keep a CPU busy

import av
import numpy as np
import torch
import torch.distributed as dist
from av.stream import Disposition
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mae_st import (SIZES, STRATEGIES, MaskedAutoencoder, from_released, learning_rate, mask_noise,
                    param_groups, patchify, random_masking)

class InputError(Exception):
    """Something the user can correct. The scripts print it as one line."""

class BadVideo(Exception):
    """A file that yields no clip. Training takes another one in its place and says so."""

@contextlib.contextmanager
def in_a_line(what, *kinds, to=InputError):
    """Errors of these kinds become one line that begins with `what`."""
    try:
        yield
    except kinds as error:
        if isinstance(error, (InputError, to)) or "DataLoader" in str(error):
            raise  # it is one line already, or a data worker has died: see `data_errors`
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise to(f"{what}: {' '.join(reason.split())[:500]}") from error

# ------------------------------------------------------------------------ a video file into clips

# Real containers and this very file only: a playlist named x.mp4 must not open other files.
SAFE_OPEN = dict(protocol_whitelist="file", format_whitelist="mov,mp4,m4a,3gp,3g2,mj2,matroska,"
                 "webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,h264,hevc,ivf,m4v,obu")
TAGS = {"metadata_errors": "ignore"} if av.__version__.startswith("18.") else {}  # not UTF-8
MAX_PIXELS = 2**25  # of a frame; 8K video has 33.2 million

@contextlib.contextmanager
def open_video(path):
    """The container and its main video stream. Errors while it is read become BadVideo."""
    with in_a_line("no video", av.FFmpegError, OSError, UnicodeError, to=BadVideo):
        if not os.path.isfile(path):
            raise BadVideo("no such file, or not a regular file")
        with av.open(os.path.abspath(path), options=SAFE_OPEN, **TAGS) as container:
            stream, cover_art = container.streams.best("video"), Disposition.attached_pic
            if not stream or stream.disposition & cover_art or not stream.codec_context:
                raise BadVideo("no video stream, or none that can be decoded")
            check_size(stream)
            stream.codec_context.thread_count = 1
            yield container, stream

def check_size(picture):
    """Of a stream, whose header may be wrong, and of every frame."""
    if picture.width * picture.height > MAX_PIXELS:
        raise BadVideo(f"{picture.width} x {picture.height} pixels, at most {MAX_PIXELS} are read")

def read_clips(path, clips, size):
    """Several clips of one video from one decode: uint8 (R, T, H, W, 3), or BadVideo. size: (H, W).
    A clip says when (`times`) and where (`box`, the crop and the flip), see `RandomClip`."""
    with open_video(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size]
        shown = sorted(p.pts for p in packets if not p.is_discard and p.pts is not None)
        trusted = len({packet.pts for packet in packets} - {None}) == len(packets) and shown
        trusted = trusted and container.format.name != "avi"  # which stores no times
        out = read_needed(stream, packets, shown, clips, size) if trusted else None
        return read_plainly(stream, packets, clips, size) if out is None else out

def read_needed(stream, packets, shown, clips, size):
    """`read_clips` by the packets' time stamps, or None if this file does not allow it."""
    numbers = frame_numbers(clips, shown, stream)
    wanted = {shown[number]: number for number in numbers.flat}
    frames = (f for f in decode_needed(stream.codec_context, packets, wanted) if not f.is_corrupt)
    with contextlib.suppress(av.FFmpegError):
        return render(clips, numbers, ((wanted.get(f.pts), f) for f in frames), size, stream)

def decode_needed(decoder, packets, wanted):
    """Frames, among them those of the wanted time stamps, bit for bit as in a full decode.
    For a wanted frame decoding begins at the last key frame that is not shown later (the leading
    pictures of an open group need the group before), and FFmpeg skips the frames in between that no
    other frame refers to. If the first frame out is not that one (intra refresh), none follow."""
    needed, entry = set(), None
    for i, packet in enumerate(packets):
        if packet.pts in wanted:
            begins = (k for k in range(i, 0, -1)
                      if packets[k].is_keyframe and packets[k].pts <= packet.pts)
            needed.update(range(next(begins, 0), i + 1))
    # In HEVC a frame that its own temporal layer does not need may be needed by the layers above.
    header = bytes(decoder.extradata or b"").ljust(22)  # hvcC, which has the number of layers
    one_layer = header[0] == 1 and header[21] >> 3 & 7 == 1
    can_skip = decoder.name in ["h264", "mpeg4", "mpeg2video"] + ["hevc"] * one_layer
    for i in sorted(needed):
        decoder.skip_frame = "NONREF" if can_skip and packets[i].pts not in wanted else "DEFAULT"
        entry = packets[i].pts if i and i - 1 not in needed else entry
        frames = decoder.decode(packets[i])
        if i + 1 not in needed:
            frames += decoder.decode(None)
            decoder.flush_buffers()
        for frame in frames:
            check_size(frame)
            if entry not in (None, frame.pts):
                return
            entry = None
            yield frame

def read_plainly(stream, packets, clips, size):
    """`read_clips` for any file, by a full decode; by two where the frames fill over 64 MiB."""
    def decode(decoder=stream.codec_context):
        decoder.flush_buffers()
        decoder.skip_frame = "DEFAULT"
        for packet in [*packets, None]:
            yield from decoder.decode(packet)
    pts, held, room = [], [], 2**26
    for frame in decode():
        check_size(frame)
        pts.append(frame.pts)
        held.append(frame)
        if (room := room - sum(plane.buffer_size for plane in frame.planes)) < 0:
            held.clear()
    if not pts:
        raise BadVideo("no frame could be decoded")
    frames = enumerate(held or decode())
    if (out := render(clips, frame_numbers(clips, pts, stream), frames, size, stream)) is None:
        raise BadVideo("it decodes differently each time")
    return out

def frame_numbers(clips, pts, stream):
    """Which frames the clips show, (R, T): the last that began at or before each of their times."""
    if None in pts or any(b <= a for a, b in zip(pts, pts[1:])):  # no use: take an even rate
        seconds = np.arange(len(pts)) / float(stream.average_rate or stream.guessed_rate or 30)
    else:
        seconds = (np.array(pts) - pts[0]) * float(stream.time_base)
    times = np.stack([clip.times(seconds) for clip in clips]) + 1e-3  # Matroska rounds to 1 ms
    return np.clip(np.searchsorted(seconds, times, side="right") - 1, 0, len(seconds) - 1)

def render(clips, numbers, frames, size, stream):
    """Put frames, pairs of number and frame, into their places: uint8 (R, T, H, W, 3), or None."""
    out, missing = np.empty((*numbers.shape, *size, 3), np.uint8), set(numbers.flat)
    aspect, graphs = float(stream.sample_aspect_ratio or 1), {}
    for number, frame in frames:
        if number in missing:
            missing.remove(number)
            looks = (frame.width, frame.height, frame.format.name, frame.rotation,
                     frame.colorspace, frame.color_range)
            for r in np.flatnonzero((numbers == number).any(1)):
                if (r, looks) not in graphs:
                    graphs[r, looks] = crop_and_scale(frame, clips[r], size, aspect)
                graphs[r, looks].vpush(frame)
                out[r, numbers[r] == number] = graphs[r, looks].vpull().to_ndarray()
        if not missing:
            return out

def crop_and_scale(frame, clip, size, aspect):
    """FFmpeg's filters for frames like this: upright, cropped, scaled, RGB. aspect: a pixel's."""
    turned, width, height = frame.rotation % 360, frame.width, frame.height
    if turned in (90, 270):
        width, height, aspect = height, width, 1 / aspect
    (x, y, w, h), flip = clip.box(width * aspect, height)  # shares of the upright picture
    w, h = (min(side, max(2, round(part * side))) for part, side in ((w, width), (h, height)))
    x, y = min(round(x * width), width - w), min(round(y * height), height - h)
    turn = {90: ["transpose=cclock"], 180: ["hflip", "vflip"], 270: ["transpose=clock"]}
    scale = f"scale={size[1]}:{size[0]}:flags=bilinear"
    in_yuv = [scale, "format=yuv420p"] * (frame.format.name == "yuv420p")  # half the time
    steps = turn.get(turned, []) + [f"crop={w}:{h}:{x}:{y}", *in_yuv, scale, "format=rgb24"]
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add("buffer", video_size=f"{frame.width}x{frame.height}", time_base="1/1000",
                       pix_fmt=frame.format.name, pixel_aspect="1/1",
                       colorspace=str(int(frame.colorspace)), range=str(int(frame.color_range)))
    nodes = [graph.add(*step.split("=", 1)) for step in steps + ["hflip"] * flip]
    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()
    return graph

class RandomClip:
    """A clip at a random time and place: T frames, `stride` thirtieths of a second apart.
    area: range of the crop's share of the picture; its aspect is 3/4 to 4/3."""

    def __init__(self, rng, frames, stride, area=(0.5, 1.0), flip=True):
        self.start, self.flip = rng.random(), flip and rng.random() < 0.5
        self.rng, self.area, self.crop = rng, area, None
        self.offsets = np.arange(frames) * stride / 30  # s

    def times(self, seconds):
        """When its frames are on the screen, (T,). seconds (n,): when the file's frames begin."""
        return self.start * max(0.0, seconds[-1] - self.offsets[-1]) + self.offsets

    def box(self, width, height):
        """((x, y, w, h) as shares of the picture, flip), the same whenever it is asked for."""
        for _ in range(0 if self.crop else 10):
            area = self.rng.uniform(*self.area) * width * height
            aspect = math.exp(self.rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = math.sqrt(area * aspect) / width, math.sqrt(area / aspect) / height
            if w <= 1 and h <= 1:
                self.crop = self.rng.uniform(0, 1 - w), self.rng.uniform(0, 1 - h), w, h
                break
        if not self.crop:  # none fits: take the middle
            aspect = min(max(width / height, 3 / 4), 4 / 3)
            w, h = min(1, aspect * height / width), min(1, width / aspect / height)
            self.crop = (1 - w) / 2, (1 - h) / 2, w, h
        return self.crop, self.flip

# ----------------------------------------------------------------------------- clips into batches

SUFFIXES = ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .flv .3gp .ogv".split()
LINE = re.compile(rf'"?([^\0]+({"|".join(SUFFIXES)}))"?(?:[\s,]+([^\0]*))?'.replace(".", r"\."),
                  re.IGNORECASE)  # "path label", "path,label" or "path", the path perhaps in quotes

def list_videos(data):
    """A folder (flat, or one sub-folder a class) or a list file -> paths, and labels or None."""
    entries, seen = [], set()
    inside = os.walk(data, followlinks=True, onerror=print) if os.path.isdir(data) else ()
    for folder, folders, names in inside:
        if os.path.realpath(folder) in seen:  # a link upwards
            folders[:], names = [], []
        seen.add(os.path.realpath(folder))
        label = os.path.relpath(folder, data).split(os.sep)[0]
        entries += [(os.path.join(folder, name), None if label == "." else label) for name in names
                    if os.path.splitext(name)[1].lower() in SUFFIXES and name[0] != "."]  # ._x.mp4
    entries.sort(key=lambda entry: entry[0])
    if not os.path.isdir(data):
        if not os.path.isfile(data):
            raise InputError(f"{data}: no such folder or list file")
        with in_a_line(f"{data} cannot be read", OSError):
            lines = Path(data).read_text("utf-8-sig", "surrogateescape").split("\n")
        folder = os.path.dirname(os.path.abspath(data))
        for line in filter(None, map(str.strip, lines)):
            if not (match := LINE.fullmatch(line)):
                raise InputError(f"{data}: {line[:200]!r} names no video ({' '.join(SUFFIXES)})")
            entries.append((os.path.join(folder, match[1]), match[3] or None))
    if not entries:
        raise InputError(f"{data}: no video in it; looked for {' '.join(SUFFIXES)}")
    paths, labels = zip(*entries)  # one array of bytes, since each data worker copies strings
    return np.array([os.fsencode(path) for path in paths]), labels if any(labels) else None

def rng_of(*numbers):
    """Random numbers that follow from these alone: the seed, the use (one of those below), ..."""
    return np.random.default_rng(numbers)

ORDER, CLIP, REPLACEMENT = range(3)

class VideoClips(Dataset):
    """Samples of video files. `fit` takes any data set that follows this protocol:

    len(clips)     how many videos there are
    clips[k]       sample k = 0, 1, 2, ... without end, a dict with
        video      uint8 (R, T, H, W, 3), R clips of one video
        noise      (R, a, b, c), see `mask_noise`; and more tensors or lists for `loss_of`
        bad        optional: a list of lines that say what could not be read
    clips.name(k)  the file of sample k, for messages

    Everything random here follows from (seed, k, repeat), not from worker, rank or time. Sample k
    is video perm(seed, k // n)[k % n] of n; for one that cannot be read k determines another."""

    def __init__(self, paths, *, seed, repeat, frames, stride, size, noise=None, labels=None,
                 area=(0.5, 1.0), flip=True, kind=RandomClip, one_time=False):
        self.one_time = one_time  # the R clips of a sample show the same frames
        self.paths, self.seed, self.repeat, self.size = paths, seed, repeat, size
        self.look, self.kind, self.labels = (frames, stride, area, flip), kind, labels
        self.noise, self.order = noise, (None, None)  # (strategy, grid); (pass, its permutation)

    def __len__(self):
        return len(self.paths)

    def video_of(self, k):
        turn, place = divmod(k, len(self))
        if self.order[0] != turn:
            self.order = turn, rng_of(self.seed, ORDER, turn).permutation(len(self))
        return int(self.order[1][place])

    def name(self, k):
        return os.fsdecode(self.paths[self.video_of(k)])

    def __getitem__(self, k):
        video, bad, repeats = self.video_of(k), [], range(self.repeat)
        for attempt in range(100):
            clips = [self.kind(rng_of(self.seed, CLIP, k, r), *self.look) for r in repeats]
            for clip in clips if self.one_time else ():
                clip.times = clips[0].times
            path = os.fsdecode(self.paths[video])
            try:
                pixels = read_clips(path, clips, self.size)  # (R, T, H, W, 3)
                break
            except BadVideo as reason:
                bad.append(f"{path}: {reason}")
                video = int(rng_of(self.seed, REPLACEMENT, k, attempt).integers(len(self)))
        else:
            raise InputError(f"100 videos in a row cannot be read, the list is wrong: {bad[0]}")
        item = dict(video=torch.from_numpy(pixels), bad=bad, sample=[k] * self.repeat)
        if self.labels is not None:
            item["label"] = torch.full((self.repeat,), self.labels[video])
        if self.noise:
            seeds = (int(rng_of(self.seed, CLIP, k, r, 1).integers(2**62)) for r in repeats)
            (strategy, grid), rngs = self.noise, (torch.Generator().manual_seed(s) for s in seeds)
            item["noise"] = torch.cat([mask_noise(strategy, 1, grid, rng) for rng in rngs])
        return item

def collate(items):
    """Samples -> a batch: tensors concatenated, so video is (B * R, T, H, W, 3); lists joined."""
    return {key: torch.cat([item[key] for item in items]) if torch.is_tensor(value)
            else sum((item[key] for item in items), []) for key, value in items[0].items()}

STOPPING = (signal.SIGINT, signal.SIGTERM)

def loader(dataset, args, **options):
    """A DataLoader whose workers ignore signals: a process finishes its step, then ends them."""
    if args.workers:  # forks: they start at once and share the paths
        options |= dict(num_workers=args.workers, timeout=args.data_timeout,
                        multiprocessing_context="fork", worker_init_fn=lambda _: [
                            signal.signal(number, signal.SIG_IGN) for number in STOPPING])
    return DataLoader(dataset, **options)

@contextlib.contextmanager
def data_errors(files):
    """Where a data worker dies or hangs, say what was being read: files() -> names."""
    try:
        yield
    except RuntimeError as error:  # from DataLoader's queue, or from its signal handler
        if "DataLoader" not in str(error):
            raise
        raise InputError(f"the data workers gave no batch, reading {', '.join(files())}. Take a "
                         "bad file out (--check-data), raise --data-timeout, or give fewer "
                         f"--workers: {str(error).splitlines()[0]}") from error

# ------------------------------------------------------------------------------- generated videos

MOVES = "right up_right up up_left left down_left down down_right".split()

def moving_scene(rng, move, frames, size):
    """A video, uint8 (frames, size, size, 3): a camera pans over a texture in one of 8 directions,
    1 to 2 pixels a frame, and two shapes drift over it. No single frame shows the direction."""
    def velocity(angle, speed):  # x, y, pixels per frame
        return speed * np.array([np.cos(angle), -np.sin(angle)])
    flow = velocity(MOVES.index(move) * math.pi / 4, rng.uniform(1, 2))
    t, place = np.arange(frames)[:, None, None], np.arange(size) + 0.5
    # The texture: plane waves, the longer the stronger. Moved by d, their phase turns by wave * d.
    length = size * np.exp(rng.uniform(math.log(0.25), math.log(1.5), 24))
    wave = 2 * math.pi / length * velocity(rng.uniform(0, 2 * math.pi, 24), 1)  # (2, 24)
    strength = rng.normal(1, 0.5, (3, 24)) * np.exp(2j * math.pi * rng.random(24)) * length
    strength *= 45 * math.sqrt(2) / np.sqrt((abs(strength) ** 2).sum(1, keepdims=True))
    at_pixel = np.exp(1j * (wave[1] * place[:, None, None] + wave[0] * place[:, None]))
    at_time = strength * np.exp(-1j * t * (flow @ wave))  # (T, 3, 24)
    video = (at_time @ at_pixel.reshape(-1, 24).T).real.reshape(frames, 3, size, size)
    video += rng.uniform(60, 195, (3, 1, 1))
    for _ in range(2):
        tone, power = rng.uniform(20, 235, (3, 1, 1)), rng.choice([1, 2, 8])  # 8: nearly a square
        radius, field = rng.uniform(0.15, 0.25) * size, 1.4 * size  # out at one side, in at another
        x, y = rng.uniform(0, size, (2, 1, 1, 1)) + t * (
            flow + velocity(rng.uniform(0, 2 * math.pi), rng.uniform(0, 1.6)))[:, None, None, None]
        dx = abs((place - x + field / 2) % field - field / 2) / radius  # (T, 1, W)
        dy = abs((place[:, None] - y + field / 2) % field - field / 2) / radius  # (T, H, 1)
        inside = 0.5 - ((dx**power + dy**power) ** (1 / power) - 1) * radius  # edge: one pixel
        video += np.clip(inside, 0, 1)[:, None] * (tone - video)  # (T, 3, H, W)
    return video.clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)  # (T, H, W, 3)

def generate_files(folder, make, files, fps, **options):
    """Write videos, all or none, if not yet there. files: name -> what make(*...) makes it of."""
    if os.path.isdir(folder):
        return
    with in_a_line(f"cannot write videos to {folder}, make room", OSError):
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(folder)) as unfinished:
            print(f"writing {len(files)} videos to {folder}")
            for name, given in tqdm(files.items(), disable=None):
                path = Path(unfinished, "all", name)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(path, make(*given), fps, **options)
            if not os.path.isdir(folder):  # another run may have been faster
                os.rename(f"{unfinished}/all", folder)

def generate_videos(folder, args, per_class=100, held_out=40, frames=32, size=64):
    """Labelled videos in folder/train and folder/val, one sub-folder a motion; -> folder"""
    files = {f"{name}/{move}/{i:04d}.mp4": (rng_of(0, part, number, i), move, frames, size)
             for part, (name, count) in enumerate((("train", per_class), ("val", held_out)))
             for i in range(count) for number, move in enumerate(MOVES)}
    if args.rank == 0:  # at the default stride every frame is taken
        generate_files(folder, moving_scene, files, 30 / 4, crf="18")
    of_all_processes([], args)  # the others wait for process 0
    return folder

# ------------------------------------------------------------------------- files written and read

@contextlib.contextmanager
def whole_file(path, keep=1):
    """Write a file whole or not at all: yields the path to write to, renamed when all is there. The
    file before becomes last-1.pt, and so on, `keep` in all."""
    path = Path(path)
    unfinished = path.with_name(f"unfinished-{path.name}")
    names = [unfinished, path] + [path.with_stem(f"{path.stem}-{age}") for age in range(1, keep)]
    try:
        with in_a_line(f"cannot write {path}; make room, or choose another folder or size",
                       OSError, RuntimeError, ValueError, MemoryError):
            yield unfinished
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
            for newer, older in reversed(list(zip(names, names[1:]))):
                if newer.exists():
                    newer.replace(older)
    finally:
        unfinished.unlink(missing_ok=True)

def write_video(path, frames, fps, **options):
    """uint8 (T, H, W, 3) -> an H.264 file, the same bytes each time: one thread, and no mbtree."""
    options = {"threads": "1", "mbtree": "0", "preset": "veryfast"} | options
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", threads=1)))
        container.mux(stream.encode(None))

@torch.no_grad()
def write_pictures(out, model, video, mask_ratio, noise):
    """Of video (B, T, H, W, 3): original, masked and reconstruction in rows, time to the right, as
    out/reconstruction.png, and side by side as out/reconstruction.mp4."""
    video = video.permute(0, 4, 1, 2, 3)  # (B, 3, T, H, W)
    filled, mask = model.reconstruct(video, mask_ratio, noise)  # (B, 3, T', H, W), (B, t, h, w)
    for axis, times in enumerate(model.target_patch, start=1):
        mask = mask.repeat_interleave(times, axis)  # (B, T', H, W) in the end
    pixels = video[:, :, ::video.shape[2] // filled.shape[2]].float() / 255  # frames predicted
    parts = torch.stack([pixels, pixels.masked_fill(mask[:, None], 0.5), filled])
    zoom = max(1, 128 // video.shape[-1])
    parts = (parts.clamp(0, 1) * 255).round().byte().cpu().numpy().repeat(zoom, 4).repeat(zoom, 5)
    _, B, _, T, H, W = parts.shape  # (3, B, 3, T', H, W)
    image = parts.transpose(1, 0, 4, 3, 5, 2).reshape(B * 3 * H, T * W, 3)
    movie = parts.transpose(3, 1, 4, 0, 5, 2).reshape(T, B * H, 3 * W, 3)
    movie = np.pad(movie, ((0, 0), (0, B * H % 2), (0, 3 * W % 2), (0, 0)))  # H.264: even sizes
    with whole_file(out / "reconstruction.png") as path:
        av.VideoFrame.from_ndarray(image, format="rgb24").save(path)
    with whole_file(out / "reconstruction.mp4") as path:
        write_video(path, np.concatenate([movie] * 4), fps=4)

@torch.no_grad()
def errors_on_hidden(model, video, noise, mask_ratio):
    """Squared errors on hidden patches of video (B, T, H, W, 3): the model's, and those where each
    is filled with the mean colour of the visible patches nearest in space and time. (2,) sums"""
    video = video.permute(0, 4, 1, 2, 3)  # (B, 3, T, H, W)
    filled, mask = model.reconstruct(video, mask_ratio, noise)  # (B, 3, T', H, W), (B, t, h, w)
    pixels, mask = video[:, :, ::video.shape[2] // filled.shape[2]].float() / 255, mask.flatten(1)
    true, ours = (patchify(x, model.target_patch) for x in (pixels, filled))  # (B, N, P)
    cells = torch.cartesian_prod(*map(torch.arange, model.encoder.grid)).float().to(mask.device)
    apart = torch.cdist(cells, cells) + 1e6 * mask[:, None]  # (B, N, N)
    nearest = (apart < apart.amin(2, keepdim=True) + 1e-3).float()
    colour = nearest @ true.unflatten(2, (-1, 3)).mean(2) / nearest.sum(2, keepdim=True)
    guess = colour.repeat(1, 1, true.shape[2] // 3)  # (B, N, P)
    return torch.stack([(x - true)[mask].square().sum() for x in (ours, guess)])

def chart(title, series):
    """Lines as SVG, in colours for light and dark pages. series: name -> [(x, y >= 0), ...]."""
    def ticks(low, high):
        steps = (float(f"{m}e{e}") for e in range(-12, 15) for m in (1, 2, 5))
        unit = next(unit for unit in steps if high - low <= 6 * unit)
        return np.arange(math.ceil(low / unit), high / unit + 1e-9) * unit
    xs, ys = np.array([point for line in series.values() for point in line]).T
    span, top, text_y = xs.max() - xs.min() or 1, 1.05 * ys.max() or 1, 0
    x_of = lambda x: round(60 + 420 * (x - xs.min()) / span, 1)
    y_of = lambda y: round(320 - 280 * y / top, 1)
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 360" font-family="sans-serif" '
           f'font-size="14" fill="#888"><text x="14" y="24">{title}</text>']
    for y in ticks(0, top):
        out.append(f'<path d="M55 {y_of(y)}H485" stroke="#888" stroke-opacity="0.35"/>'
                   f'<text x="48" y="{y_of(y) + 5}" text-anchor="end">{y:g}</text>')
    out += [f'<text x="{x_of(x)}" y="342" text-anchor="middle">{x:g}</text>'
            for x in ticks(xs.min(), xs.max())]
    colours = dict(zip(series, "#3584e4 #e0701a #2a9d4a #b04fc8 #c0392b #888".split()))
    for name, line in sorted(series.items(), key=lambda item: -item[1][-1][1]):
        places = [(x_of(x), y_of(y)) for x, y in line]
        points = " ".join(f"{x},{y}" for x, y in places)
        out.append(f'<polyline points="{points}" fill="none" stroke="{colours[name]}"/>')
        out += [f'<circle cx="{x}" cy="{y}" r="4" fill="{colours[name]}"/>'
                for x, y in places if len(line) < 20]
        text_y = max(text_y + 18, places[-1][1] + 5)  # beside the last point, never on another text
        out.append(f'<text x="494" y="{text_y}" fill="{colours[name]}">{name}</text>')
    return "\n".join([*out, "</svg>", ""])

def read_checkpoint(path, checksums=True):
    """A checkpoint, on the CPU. Only tensors and plain values are loaded: it cannot run code."""
    if not os.path.isfile(path):
        raise InputError(f"{path} is no file; give a checkpoint that train.py wrote")
    with in_a_line(f"{path} is damaged, or no checkpoint of tensors and plain values", Exception):
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if broken := checksums and archive.testzip():
                raise ValueError(f"the checksum of {broken} is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):  # in those of mae_st
            return dict(torch.load(path, map_location="cpu", weights_only=True))

def load_init(path):
    """The checkpoint given as --init: one of ours, or a released one converted to ours."""
    with in_a_line(f"--init {path}", ValueError, TypeError, AttributeError, KeyError):
        content = read_checkpoint(path)
        content.pop("optimizer", None)  # two thirds of the memory
        return from_released(content)

def build(kind, model_args, weights=None, path=None):
    """A model of these arguments, with the weights of the checkpoint `path` if given."""
    with in_a_line("no such model can be built", ValueError, TypeError, RuntimeError, MemoryError):
        model = kind(**model_args)
    if weights is not None:
        with in_a_line(f"{path} does not fit this model", RuntimeError, TypeError):
            model.load_state_dict(weights)
    return model

# ------------------------------------------------------------------------------ flags and machine

# By size. base, large and huge: the paper code's configs k400_VIT_{B,L,H}_16x4_MAE_PT, whose rates
# are for a node's batch of 64, 32 and 32; all others of its numbers are the flags' defaults. small:
# one GPU and one day. tiny: small videos on a CPU; without --data those that `moving_scene` makes.
RECIPE = {
    "huge": dict(lr=1.6e-3, warmup=60 / 400, epochs=400),  # BASE_LR 1e-4 / 32, WARMUP, MAX_EPOCH
    "large": dict(lr=1.6e-3, warmup=30 / 200, epochs=200),  # 1e-4 / 32
    "base": dict(lr=8e-4, warmup=60 / 200, epochs=200),  # 1e-4 / 64
    "small": dict(lr=8e-4, warmup=0.1, steps=75_000, batch_size=32, accum=4),  # 38 M clips
    "tiny": dict(lr=0.04, warmup=0.1, steps=1200, batch_size=32, repeat=1, size=(64, 64),
                 patch=(2, 8, 8), decode_ratio=0.25, norm_pix=False, clip=1.0),
}

DTYPES = dict(off=None, bf16=torch.bfloat16, fp16=torch.float16)  # of --amp

class Parser(argparse.ArgumentParser):
    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        raise InputError(f"{message}; see --help")

def text(value):
    """For argparse: not empty, as the value of an unset variable is."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty: give a value, or leave the flag out")
    return value

def between(low, high, kind=float):
    """For argparse: a number in [low, high]."""
    def number(value):
        if not low <= kind(value) <= high:
            raise argparse.ArgumentTypeError(f"{value} is not from {low:g} to {high:g}")
        return kind(value)
    return number

def sizes(count):
    """For argparse: "2x16x16" -> three whole numbers; of two, 224 means 224x224."""
    def size(value):
        numbers = tuple(map(int, value.split("x"))) * (2 if count == 2 and "x" not in value else 1)
        if len(numbers) != count or not all(1 <= number <= 8192 for number in numbers):
            raise argparse.ArgumentTypeError(f"{value} is not {count} numbers from 1 to 8192")
        return numbers
    return size

def shared_flags(about, recipe):
    """A parser with the flags of train.py and finetune.py."""
    parser = Parser(about.split("\n\n")[0])
    parser.epilog = f"By --model: {recipe}"
    add, count, positive = parser.add_argument, between(1, 10**9, int), between(1e-12, 1e9)
    size, onoff = between(1, 65536, int), argparse.BooleanOptionalAction
    add("--data", type=text, help="folder of videos or list file; without it some are generated")
    add("--frames", type=between(1, 1024, int), default=16, help="of a clip")
    add("--stride", type=positive, default=4.0, help="between frames, in thirtieths of a second")
    add("--size", type=sizes(2), default=(224, 224), help="height x width of a clip")
    add("--repeat", type=between(1, 1024, int), default=4, help="clips from each decoded video")
    add("--model", choices=SIZES, help="size, which has its recipe")
    add("--patch", type=sizes(3), default=(2, 16, 16), help="frames x height x width")
    add("--checkpointing", action="store_true", help="less memory, a third more time")
    add("--epochs", type=positive, help="passes over the list")
    add("--steps", type=count, help="optimizer steps in all, in place of --epochs")
    add("--batch-size", type=size, help="videos per process and micro-batch (GPU: 16, CPU: 2)")
    add("--accum", type=size, default=1, help="micro-batches per step")
    add("--weight-decay", type=between(0, 10), default=0.05, help="of matrices and tables")
    add("--clip", type=positive, default=0.02, help="largest norm of the gradient")
    add("--seed", type=between(0, 2**31, int), default=0, help="everything random follows from it")
    add("--init", type=text, help="checkpoint to take the weights from")
    add("--save-every", type=count, help="steps between checkpoints (a twentieth of the run)")
    add("--keep", type=between(1, 100, int), default=2, help="checkpoints to keep")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="precision")
    add("--compile", action=onoff, help="torch.compile (on a GPU)")
    add("--workers", type=between(0, 256, int), help="data workers per process (from the CPUs)")
    add("--data-timeout", type=between(1, 86400, int), default=300, help="s to wait for a batch")
    parser.set_defaults(lr_ends=(0.01, 0.01))  # first and last rate, as shares of the highest
    return parser

def first_look(parser, argv):
    """The flags that decide on the defaults of others, so that --help can show these."""
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_known_args([flag for flag in argv if flag not in ("-h", "--help")])[0]
    given.help = not {"-h", "--help"}.isdisjoint(argv)
    return given

def parse_arguments(argv=None):
    parser = shared_flags(__doc__, RECIPE)
    add, share, onoff = parser.add_argument, between(0, 1), argparse.BooleanOptionalAction
    add("--mask-ratio", type=share, default=0.9, help="share of the tokens that is hidden")
    add("--strategy", choices=STRATEGIES, default="agnostic", help="what is hidden together")
    add("--decode-ratio", type=between(0.01, 1), default=1.0, help="share of hidden ones decoded")
    add("--target", choices=("frame", "patch"), default="frame", help="a patch's first frame, all")
    add("--norm-pix", action=onoff, default=True, help="normalise each target patch")
    add("--lr", type=between(1e-12, 1e9), help="per 512 videos a step; begins and ends at 1 %%")
    add("--warmup", type=share, help="share of the steps")
    add("--out", type=text, default="runs/pretrain", help="folder; a run that is in it goes on")
    add("--reconstruct", type=text, metavar="VIDEO", help="only show what --init makes of it")
    add("--check-data", action="store_true", help="only read every file of --data once")
    given = first_look(parser, argv)
    model = given.model or ("large" if given.data else "tiny")
    parser.set_defaults(model=model, **RECIPE[model] | (dict(steps=None) if given.epochs else {}))
    if given.reconstruct:  # these come from the checkpoint
        parser.set_defaults(mask_ratio=None, strategy=None, stride=None, out="runs/reconstruct")
    return parser.parse_args(argv)

def setup(args):
    """Find the device and, under torchrun, the other processes; choose what was not given."""
    args.rank, local, args.world, here = (int(os.environ.get(key, default)) for key, default in (
        ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    if args.rank > 0:  # process 0 speaks for all; errors of the others go to stderr
        sys.stdout = open(os.devnull, "w")
    gpus, linux = torch.cuda.device_count(), hasattr(os, "sched_getaffinity")
    cpus = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    if args.device == "auto" and not gpus and "WORLD_SIZE" in os.environ and (
            args.world > 1 or torch.version.cuda):
        raise InputError(f"torch {torch.__version__} sees no GPU for torchrun's {args.world} "
                         "processes, perhaps since the driver is old: mend it, or --device cpu")
    gpu = args.device == "cuda" or args.device == "auto" and gpus > 0
    if gpu and local >= gpus:
        raise InputError(f"process {local} of this machine has no GPU, torch sees {gpus}: give "
                         "--device cpu, or torchrun a smaller --nproc_per_node")
    if args.amp == "fp16" and not gpu:
        raise InputError("--amp fp16 needs a GPU; on a CPU choose bf16 or off")
    if gpu:
        torch.cuda.set_device(local)
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.world > 1:
        # Restarted by torchrun, we must not find the addresses of the dead processes in its store.
        prefix = f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        store = dist.PrefixStore(prefix, next(dist.rendezvous("env://"))[0])
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=args.rank,
                                world_size=args.world, timeout=timedelta(hours=2))
    bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    chosen = dict(device="cuda" if gpu else "cpu", amp="bf16" if bf16 else "off", compile=gpu,
                  batch_size=16 if gpu else 2,
                  workers=min(32, max(1, cpus // here - 1)) if gpu else 1)
    chosen = {key: x for key, x in chosen.items() if vars(args).get(key, 0) in (None, "auto")}
    vars(args).update(chosen)
    print(f"for {gpus} GPUs{', bf16' * bf16} and {cpus} CPUs chosen:",
          ", ".join(f"--{key.replace('_', '-')} {x}" for key, x in chosen.items()) or "nothing")
    if TORCH_CAME_FIRST and not gpu:
        print("torch was imported before train.py, so its threads may slow the data workers down: "
              "import train first, or set OMP_WAIT_POLICY=PASSIVE")

def plan(args, videos, batch):
    """The number of steps, and the learning rate: --lr is for a step of `batch` videos."""
    args.videos_per_step = args.batch_size * args.accum * args.world
    args.steps = args.steps or math.ceil(args.epochs * videos / args.videos_per_step)
    args.peak_lr = args.lr * args.videos_per_step / batch
    args.first_lr, args.last_lr = (share * args.peak_lr for share in args.lr_ends)
    args.save_every = args.save_every or math.ceil(args.steps / 20)
    print(f"{args.steps} steps of {args.videos_per_step} x {args.repeat} clips = "
          f"{args.steps * args.videos_per_step / videos:.1f} passes over {videos} videos; "
          f"learning rate {args.lr:g} x {args.videos_per_step} / {batch} = {args.peak_lr:.3g}")
    if args.videos_per_step * 100 < batch:
        print("that rate is under a hundredth of --lr, which is too low to learn much: raise "
              "--batch-size or --accum, or --lr")

# ------------------------------------------------------------------------------ the training loop

def batches_on_device(clips, args, start, awaited):
    """The batches from step `start` on, on the device, their video as (B * R, 3, T, H, W). A step
    takes batch_size * accum * world samples in order; its micro-batch a on rank r is the slice
    a * world + r of them. awaited[:] are the samples that are being read."""
    def samples():
        for micro in range(start * args.accum, args.steps * args.accum):
            first = (micro * args.world + args.rank) * args.batch_size
            yield range(first, first + args.batch_size)
    gpu, skipped = args.device == "cuda", Counter()
    side = torch.cuda.Stream() if gpu else None  # copies while a step computes
    batches = iter(loader(clips, args, batch_sampler=samples(), collate_fn=collate, pin_memory=gpu))
    for number, awaited[:] in enumerate(samples(), start=1):
        batch = next(batches)
        for line in batch.pop("bad", []):
            skipped[line] += 1
            if skipped[line] == 1:
                tqdm.write(f"skipped, another video takes its place: {line}", file=sys.stderr)
        if (failed := skipped.total()) >= 8 and failed > (good := number * args.batch_size):
            raise InputError(f"{failed} of {failed + good} videos cannot be read, so the list is "
                             f"probably wrong: {'; '.join(list(skipped)[:3])}")
        with torch.cuda.stream(side) if gpu else contextlib.nullcontext():
            tensors = {key: x.to(args.device, non_blocking=True) for key, x in batch.items()
                       if torch.is_tensor(x)}
        if gpu:
            torch.cuda.current_stream().wait_stream(side)
            for tensor in tensors.values():
                tensor.record_stream(torch.cuda.current_stream())
        yield batch | tensors | dict(video=tensors["video"].permute(0, 4, 1, 2, 3))
    if lines := sorted(set(of_all_processes(list(skipped), args))):
        print(f"{len(lines)} of {len(clips)} videos could not be read:", *lines, sep="\n  ")

def of_all_processes(items, args):
    """The lists of all processes, joined."""
    lists = [items] * args.world
    if args.world > 1:
        dist.all_gather_object(lists, items)
    return sum(lists, [])

def mean_of_all_processes(row, args):
    """Each number of the dict as its mean over the processes. Waits for the device."""
    values = torch.tensor([float(x) for x in row.values()], dtype=torch.float64, device=args.device)
    if args.world > 1:
        dist.all_reduce(values)
    return dict(zip(row, (values / args.world).tolist()))

def mark(device):
    """A point in time: on a GPU in its own queue of work."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event

def elapsed(begin, end):
    """Seconds between two marks. On a GPU this waits until the second one is reached."""
    if isinstance(end, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3

def update(optimizer, scaler, parameters, clip, loss):
    """Clip the gradient, and step unless it or the loss is not finite. Returns its norm."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if not scaler.is_enabled():  # a scaler does the same check
        optimizer.found_inf = (~torch.isfinite(norm + loss)).float()  # fused AdamW reads it
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm

def resume(args, parts, keep, log):
    """Load the newest good checkpoint of --out, if any, into `parts` and `keep`. -> its step"""
    paths = sorted(Path(args.out).glob("last*.pt"), key=lambda path: (len(path.name), path.name))
    content, path = None, None
    while paths and content is None and args.rank == 0:
        try:
            content = read_checkpoint(path := paths.pop(0))
        except InputError as problem:
            if not paths:
                raise
            print(f"{problem}; trying the checkpoint before it")
    path = of_all_processes([path], args)[0]
    if args.rank > 0 and path:  # process 0 has looked at the checksums
        content = read_checkpoint(path, checksums=False)
    if len(set(of_all_processes([content and content.get("step")], args))) > 1:
        raise InputError(f"--out {args.out} must be a folder that all processes share")
    if content is None:
        if args.rank == 0:
            log.truncate(0)  # of a run that ended before its first checkpoint
        return 0
    with in_a_line(f"{path} is no checkpoint of such a run, choose another --out", Exception):
        before, now = content["identity"], keep["identity"]
        if changes := [f"{key} {before.get(key)} -> {value}" for key, value in now.items()
                       if before.get(key) != value]:
            raise InputError(f"--out {args.out} holds a run with other arguments: "
                             f"{'; '.join(changes)}. Use the old ones, or choose another --out")
        for name, part in parts.items():
            part.load_state_dict(content[name])
        keep.update({key: content[key] for key in keep})
        if args.rank == 0:
            log.truncate(min(content["log_bytes"], log.tell()))  # so that no step is logged twice
        done = content["step"] >= args.steps
        print("nothing is left to train, for other code choose another --out:" if done else
              "going on from", f"{path} after step {content['step']:d} of {args.steps}")
        return content["step"]

def log_line(row):
    """A row of log.jsonl. JSON has no word for numbers that are not finite: they become null."""
    return json.dumps({key: None if isinstance(x, float) and not math.isfinite(x) else x
                       for key, x in row.items()}) + "\n"

@contextlib.contextmanager
def run_folder(args):
    """The log of the folder --out, locked against other runs; a list of the signals to stop that
    came; and a stack for what is to be closed at the end."""
    def receive(number, _):
        stop.append(number)
        if args.world == 1:  # torchrun sends each Ctrl-C twice
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.write(2, b"\nfinishing the step, then saving; Ctrl-C again ends at once\n")

    out, stop = Path(args.out), []
    with contextlib.ExitStack() as at_end:
        with in_a_line(f"--out {out} cannot be used, perhaps since another run does", OSError):
            out.mkdir(parents=True, exist_ok=True)
            log = open(out / "log.jsonl" if args.rank == 0 else os.devnull, "a", buffering=1)
            at_end.enter_context(log)
            if args.rank == 0:
                fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # data workers do not inherit it
        for number in STOPPING:
            at_end.callback(signal.signal, number, signal.signal(number, receive))
        yield log, stop, at_end

def check_finite(row, scaler, clips, args):
    """Stop at a loss or gradient that is not finite. With a scaler some gradients may overflow."""
    may_overflow = scaler.is_enabled() and scaler.get_scale() >= 1
    if not math.isfinite(row["loss"] + (0 if may_overflow else row["grad_norm"])):
        end = row["step"] * args.videos_per_step
        names = sorted({clips.name(k) for k in range(end - args.videos_per_step, end)})
        raise InputError(f"loss {row['loss']} and gradient norm {row['grad_norm']} at step "
                         f"{row['step']} are not finite; nothing was changed or saved. Lower --lr, "
                         f"or try --amp off. The videos were {', '.join(names[:8])}")

def progress(args, start, at_end):
    """A bar in a terminal, elsewhere a line a minute, with the mean loss of the last 50 steps:
    -> show(row of the log)"""
    bar = at_end.enter_context(tqdm(total=args.steps, initial=start, disable=args.rank > 0 or None))
    recent, due = [], [time.monotonic() + 60]

    def show(row):
        recent[:] = [*recent[-49:], row["loss"]]
        state = "loss {:.4f} lr {lr:.2e} clips/s {clips_per_s:.1f} wait {data_wait:.0%}".format(
            sum(recent) / len(recent), **row)
        bar.set_postfix_str(state, refresh=False)
        bar.update()
        if bar.disable and time.monotonic() > due[0]:
            print(f"step {row['step']} of {args.steps}: {state}")
            due[0] = time.monotonic() + 60
    return show

def save_run(args, parts, values):
    """last.pt: the states of the parts and plain values; and args.json, to be read by people."""
    before = time.monotonic()
    with whole_file(Path(args.out) / "last.pt", args.keep) as path:
        torch.save({name: part.state_dict() for name, part in parts.items()} | values, path)
    with whole_file(Path(args.out) / "args.json") as path:
        path.write_text(json.dumps(vars(args), indent=1) + "\n")
    if (seconds := time.monotonic() - before) > 10:
        print(f"saving took {seconds:.0f} s; torchrun kills 30 s after SIGTERM")

def fit(args, model, optimizer, clips, loss_of, keep, at_save):
    """Train to the last step, from the newest checkpoint in --out if there is one.
    optimizer: fused. clips: see `VideoClips`. loss_of(model, batch) -> dict(loss=..., more numbers
    to log) of a micro-batch. keep: plain values for the checkpoint. at_save(step), called before
    each checkpoint, may return a row for the log."""
    dtype, scaler = DTYPES[args.amp], torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
    parts, awaited = dict(model=model, optimizer=optimizer, scaler=scaler), []
    with run_folder(args) as (log, stop, at_end), data_errors(lambda: map(clips.name, awaited)):
        start = resume(args, parts, keep, log)
        forward = torch.compile(model) if args.compile else model
        if args.world > 1:  # large buckets: DDP splits a compiled model where one is full
            forward = DDP(forward, bucket_cap_mb=100, gradient_as_bucket_view=True)
        show = progress(args, start, at_end)
        batches = batches_on_device(clips, args, start, awaited)
        at_end.callback(batches.close)  # ends the data workers
        batch = next(batches, None)
        for step in range(start + 1, args.steps + 1):
            begin, waits, sums, seen = mark(args.device), [], Counter(), 0
            lr = learning_rate(step - 1, args.steps, args.peak_lr, args.warmup, args.first_lr,
                               args.last_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1)
            for micro in range(args.accum):
                last = micro == args.accum - 1
                with contextlib.nullcontext() if last or args.world == 1 else forward.no_sync():
                    with torch.autocast(args.device, dtype, enabled=dtype is not None):
                        numbers = loss_of(forward, batch)
                    scaler.scale(numbers["loss"] / args.accum).backward()
                sums.update({name: torch.as_tensor(number).detach() / args.accum
                             for name, number in numbers.items()})
                seen += len(batch["video"])
                if last:
                    norm = update(optimizer, scaler, model.parameters(), args.clip, sums["loss"])
                free = mark(args.device)
                batch = next(batches, None)  # read, and copied while the device computes
                waits.append((free, mark(args.device)))
            seconds = elapsed(begin, waits[-1][1])
            row = dict(step=step, epoch=step * args.videos_per_step / len(clips))
            row |= mean_of_all_processes(dict(
                sums, lr=lr, grad_norm=norm, clips_per_s=seen * args.world / seconds,
                data_wait=sum(elapsed(*wait) for wait in waits) / seconds, stop=len(stop)), args)
            row["peak_mem_gb"] = torch.cuda.max_memory_allocated() / 1e9 or None  # CPU: null
            stopping = row.pop("stop") > 0
            log.write(log_line(row))
            check_finite(row, scaler, clips, args)
            show(row)
            if stopping or step % args.save_every == 0 or step == args.steps:
                if note := at_save(step):
                    log.write(log_line(note))
                if args.rank == 0:
                    save_run(args, parts, keep | dict(step=step, log_bytes=log.tell()))
            if stopping and step < args.steps:
                print(f"stopped after step {step} of {args.steps}, saved; the same command goes on")
                sys.exit(128 + (stop or [signal.SIGTERM])[0])

# ----------------------------------------------------------------------------------- pre-training

# Flags that a run may go on with though they have changed; all others must be as before.
MAY_CHANGE = set("data out workers data_timeout device compile save_every keep batch_size accum "
                 "rank world checkpointing epochs reconstruct check_data val views compare".split())

def identity(args, paths):
    """What must be as before for a run to go on: most flags, and the list, whatever its folder."""
    root = os.path.dirname(os.path.commonprefix(list(paths)))
    return {key: value for key, value in vars(args).items() if key not in MAY_CHANGE} | dict(
        checksum_of_list=zlib.crc32(b"\n".join(paths).replace(root, b"")))

def loss_of_the_mean(model, video, mask_ratio, noise):
    """The loss of a model that always predicts the mean of its targets."""
    patches = model.encoder.patchify(video)  # (B, N, P)
    target, _ = model.targets(patches, model.masking(patches, mask_ratio, noise)[1])
    return model.loss(target.mean().expand_as(target), target)

def pretrain(args, clips=None):
    """Pre-train on the videos of --data, or on a data set `clips` of your own, see `VideoClips`."""
    torch.manual_seed(args.seed)
    model_args = SIZES[args.model] | dict(
        frames=args.frames, height=args.size[0], width=args.size[1], patch=args.patch,
        target=args.target, norm_pix=args.norm_pix, checkpointing=args.checkpointing)
    weights = load_init(args.init)["model"] if args.init else None
    model = build(MaskedAutoencoder, model_args, weights, args.init).to(args.device)
    grid, paths = model.encoder.grid, [b""]
    with in_a_line("no mask", ValueError):
        ids = random_masking(mask_noise(args.strategy, 1, grid), grid, args.mask_ratio)
    print(f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
          f"{ids[0].shape[1]} tokens visible, {ids[1].shape[1]} hidden ({args.strategy})")
    if clips is None:
        args.data = args.data or generate_videos("data/moving_scenes", args) + "/train"
        paths, _ = list_videos(args.data)
        clips = VideoClips(paths, seed=args.seed, repeat=args.repeat, frames=args.frames,
                           stride=args.stride, size=args.size, noise=(args.strategy, grid))
    plan(args, len(clips), 512)
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=args.peak_lr,
                                  betas=(0.9, 0.95), fused=True)
    first = collate([clips[k] for k in range(4)])
    video, noise = (first[key].to(args.device) for key in ("video", "noise"))
    mean = float(loss_of_the_mean(model, video.permute(0, 4, 1, 2, 3), args.mask_ratio, noise))
    print(f"loss of always predicting the mean: {mean:.4f}; training should get well below")

    def loss_of(model, batch):
        return dict(loss=model(batch["video"], args.mask_ratio, batch["noise"], args.decode_ratio))

    def draw(_, out=Path(args.out)):
        if args.rank == 0:  # one clip of each of the first four videos
            each = len(video) // 4
            write_pictures(out, model, video[::each], args.mask_ratio, noise[::each])

    with tempfile.TemporaryDirectory() as folder:  # sizes that cannot be encoded are refused now
        draw(0, Path(folder))
    keep = dict(identity=identity(args, paths) | dict(videos=len(clips)), model_args=model_args)
    fit(args, model, optimizer, clips, loss_of, keep, at_save=draw)
    draw(args.steps)
    if args.rank == 0:
        if not args.norm_pix:  # there brightness and contrast come from the original
            groups = (collate([clips[k] for k in range(i, i + 4)]) for i in range(0, 64, 4))
            ours, other = sum(errors_on_hidden(model, *(group[key].to(args.device) for key in (
                "video", "noise")), args.mask_ratio) for group in groups)
            share = f"{float(ours / other):.2f} of that of the nearest visible colours"
            print(f"error on hidden patches: {share}")
        report(args, mean)

def report(args, mean):
    """The end of pre-training: loss.svg, and the loss beside that of predicting the mean."""
    with open(Path(args.out) / "log.jsonl") as log:
        losses = [row["loss"] for row in map(json.loads, log) if "loss" in row]
    part = math.ceil(len(losses) / 20)  # the last 5 % of the steps
    smooth = np.convolve(losses, np.ones(part) / part, "valid")
    line = [(part + i, smooth[i]) for i in range(len(smooth) - 1, -1, -max(1, part // 10))][::-1]
    with whole_file(Path(args.out) / "loss.svg") as path:
        path.write_text(chart("loss, mean of a twentieth of the steps, up to step", {
            f"training {smooth[-1]:.3f}": line,
            f"predicting the mean {mean:.3f}": [(x, mean) for x, _ in (line[0], line[-1])]}))
    print(f"{args.out} has last.pt, log.jsonl, loss.svg, reconstruction.png and .mp4; mean loss of "
          f"the last {part} steps {smooth[-1]:.4f}, of always predicting the mean {mean:.4f}")

def reconstruct(args):
    """Pictures of one video, from a checkpoint."""
    if not args.init:
        raise InputError("--reconstruct needs a trained model: give a checkpoint with --init")
    content = load_init(args.init)
    model = build(MaskedAutoencoder, content["model_args"], content["model"], args.init)
    given = {key: value for key, value in vars(args).items() if value is not None}
    use = dict(mask_ratio=0.9, strategy="agnostic", stride=4) | content.get("identity", {}) | given
    frames, *size = model.encoder.video_size
    clips = [RandomClip(rng_of(args.seed, CLIP, 0, i), frames, use["stride"]) for i in range(4)]
    rng, out = torch.Generator().manual_seed(args.seed), Path(args.out)
    with in_a_line(f"--reconstruct {args.reconstruct}", BadVideo, ValueError, OSError):
        out.mkdir(parents=True, exist_ok=True)
        noise = mask_noise(use["strategy"], 4, model.encoder.grid, rng).to(args.device)
        video = torch.from_numpy(read_clips(args.reconstruct, clips, size)).to(args.device)
        write_pictures(out, model.to(args.device), video, use["mask_ratio"], noise)
    print(f"{out}/reconstruction.png and .mp4: {use['mask_ratio']:.0%} hidden ({use['strategy']})")

def check_data(args):
    """Decode every file once; name the bad ones."""
    def what_is_wrong(path):
        try:
            with open_video(path) as (container, stream):
                return [] if sum(1 for _ in container.decode(stream)) else [f"{path}: no frame"]
        except BadVideo as reason:
            return [f"{path}: {reason}"]

    paths, bad = [os.fsdecode(path) for path in list_videos(args.data)[0]], []
    answers = iter(loader(paths, args, batch_size=None, collate_fn=what_is_wrong))
    for path in tqdm(paths, disable=None):
        with data_errors(lambda: [path]):
            bad += next(answers)
    print(*bad, f"{len(paths)} videos, {len(bad)} bad", sep="\n")
    return len(bad) > 0

def main(argv=None, clips=None):
    """clips: a data set of your own in place of --data, see `VideoClips`."""
    args = parse_arguments(argv)
    setup(args)
    if args.check_data and not args.data:
        raise InputError("--check-data reads the videos of --data: give it")
    if args.reconstruct:
        return reconstruct(args)
    return check_data(args) if args.check_data else pretrain(args, clips)

def run_script(main):
    """Run a script's main(). What the user can correct is one line and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # the name of a file may be no text
    status, said = 1, None
    try:
        status = (record(main) if "TORCHELASTIC_ERROR_FILE" in os.environ else main)() or 0
    except InputError as error:
        said = str(error).splitlines()[-1].split("InputError: ")[-1]  # from a data worker
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        said = f"{error.strerror}, while the log was written; make room, the same command goes on"
    except torch.OutOfMemoryError as error:
        said = (f"{str(error).splitlines()[0]} In training lower --batch-size and raise --accum by "
                "as much, or add --checkpointing")
    except KeyboardInterrupt:
        status = 130
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        said = "another process of this run has ended, see its message"
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():  # they ignore gentler signals
            worker.kill()
    if said:
        print(f"error: {said}", file=sys.stderr)
    elif dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)

if __name__ == "__main__":
    run_script(main)
