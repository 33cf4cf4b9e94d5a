"""Pre-train a spatiotemporal masked autoencoder on video files.

    python train.py                                    no data, no GPU: writes a small set of videos and trains on it
    python train.py --data my_videos --model base      a folder, or a list file with one "path label" or "path" a line
    torchrun --nproc_per_node=8 train.py --data kinetics/train.csv --model large      the paper's recipe
    python train.py --reconstruct clip.mp4 --init runs/pretrain/last.pt               look at a reconstruction

From top to bottom: videos into clips, clips into batches, the generated videos, pictures, checkpoints, the run.
"""

import argparse
import contextlib
import errno
import fcntl
import json
import math
import multiprocessing
import os
import pickle
import platform
import shutil
import signal
import stat
import sys
import textwrap
import time
import zipfile
import zlib
from collections import Counter
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

# Read when torch loads its OpenMP: waiting threads sleep. By default they spin, and on a CPU whose cores are shared with
# the data workers (or anybody else) each small operation then waits for the scheduler: steps took up to 30 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import av
import numpy as np
import torch
import torch.distributed as dist
from av.stream import Disposition
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mae_st import SIZES, STRATEGIES, MaskedAutoencoder, from_released, mask_noise, split_tokens


class InputError(Exception):
    """Something the person can put right. The scripts print it as one line: what was given, what is allowed, what to change."""


class BadVideo(Exception):
    """A file that yields no clip. Training takes another one in its place and says so."""


# --------------------------------------------------------------------------------- from a video file to clips

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".ogv"}
# Only real containers and only this very file: a playlist named x.mp4 must not open other files or the network.
SAFE_OPEN = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,h264,hevc,ivf,m4v,obu",
             "protocol_whitelist": "file"}
# Tags that are no UTF-8: PyAV 18 (the last for Python 3.11) would refuse the file, 19 takes them as they are.
TAGS = {"metadata_errors": "ignore"} if av.__version__.startswith("18.") else {}
MAX_PIXELS = 2**25  # 8K video has 33.2 million
HELD_BYTES = 2**26  # larger files, and frames that come to more, are read twice instead of held in memory
SLACK = 1e-3  # s; Matroska rounds time stamps to milliseconds


class Packets(NamedTuple):
    """What is known of a stream without decoding it."""
    packets: list  # in decoding order; empty for a file too large to hold
    pts: list  # time stamp of each
    shown: list  # time stamps of the frames to show, sorted
    entry: list  # True: decoding may begin here, and everything shown later comes out right
    droppable: list  # True: no other frame is predicted from this one


@contextlib.contextmanager
def open_video(path):
    """The container and its main video stream, set to decode in this thread alone. Whatever goes wrong with the file, also
    later while it is read, becomes BadVideo."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadVideo("not a regular file")
        with av.open(os.path.abspath(path), options=SAFE_OPEN, **TAGS) as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic and s.codec_context]
            if not streams:
                raise BadVideo("no video stream")
            stream = max(streams, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height))
            if not 0 < stream.width * stream.height <= MAX_PIXELS:
                raise BadVideo(f"frames of {stream.width} x {stream.height}, at most {MAX_PIXELS} pixels are read")
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, OSError, UnicodeError) as error:
        raise BadVideo(f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}") from error


def nal_headers(data, length_size):
    """The positions of the NAL unit headers in an H.264 or HEVC packet (bytes).

    length_size: bytes of the length before each unit (MP4, Matroska), 0 for start codes (MPEG-TS, raw).
    """
    if length_size:
        at = 0
        while at + length_size + 1 < len(data):
            yield at + length_size
            at += length_size + int.from_bytes(data[at:at + length_size], "big")
    else:
        at = data.find(b"\0\0\1")
        while 0 <= at < len(data) - 4:
            yield at + 3
            at = data.find(b"\0\0\1", at + 3)


def h264_packet(data, length_size):
    """(may decoding begin here, does nothing refer to the picture, its temporal layer) of one H.264 packet: 7.4.1 of H.264.

    Slices are NAL types 1 to 5. Only 5, IDR, is a beginning: after other key frames (recovery points) a picture may still
    refer to older ones. nal_ref_idc = 0 says that nothing refers to the picture.
    """
    slices = [data[at] for at in nal_headers(data, length_size) if 1 <= data[at] & 31 <= 5]
    return any(header & 31 == 5 for header in slices), bool(slices) and not any(header & 0x60 for header in slices), 0


def hevc_packet(data, length_size):
    """The same of one HEVC packet: table 7-1 of H.265. That nothing refers to a picture is said about its own layer there."""
    slices = [(data[at] >> 1 & 63, data[at + 1] & 7) for at in nal_headers(data, length_size) if data[at] >> 1 & 63 < 32]
    unneeded = bool(slices) and all(kind <= 14 and kind % 2 == 0 for kind, _ in slices)
    return any(16 <= kind <= 23 for kind, _ in slices), unneeded, max((layer for _, layer in slices), default=0)


def read_packets(container, stream):
    """What the packets of the stream tell, or None if their time stamps cannot be trusted (missing, doubled, or AVI's)."""
    codec, extradata = stream.codec_context.name, bytes(stream.codec_context.extradata or b"")
    look, length_at = {"h264": (h264_packet, 4), "hevc": (hevc_packet, 21)}.get(codec, (None, 0))  # of lengthSizeMinusOne in avcC and hvcC
    length_size = (extradata[length_at] & 3) + 1 if len(extradata) > length_at and extradata[0] == 1 else 0
    packets, pts, shown, entry, droppable, layers = [], [], [], [], [], []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if container.size <= HELD_BYTES:
            packets.append(packet)
        if not packet.is_discard:  # edit lists cut frames off: those are decoded, but not shown
            shown.append(packet.pts)
        pts.append(packet.pts)
        begins, unneeded, layer = look(bytes(packet), length_size) if look else (packet.is_keyframe, False, 0)
        entry.append(begins)
        droppable.append(unneeded)
        layers.append(layer)
    top = max(layers, default=0)  # a picture that nothing in its layer refers to may still serve the layers above
    droppable = [unneeded and layer == top for unneeded, layer in zip(droppable, layers)]
    trusted = container.format.name != "avi" and None not in pts and len(set(pts)) == len(pts) and stream.time_base
    return Packets(packets, pts, sorted(shown), entry, droppable) if shown and trusted else None


def shown_at(times, seconds):
    """Which frame is on the screen: the last that began at or before each time. times (T,), seconds (n,) sorted -> (T,) numbers."""
    return np.clip(np.searchsorted(seconds, np.asarray(times) + SLACK, side="right") - 1, 0, len(seconds) - 1)


def needed_packets(table, wanted):
    """(numbers of the packets to decode, numbers of those after which the decoder is emptied), for wanted time stamps.

    Per wanted frame: from the last packet before it at which decoding may begin and that is not shown later (a
    leading picture of an open group needs the group before), to its own packet. Droppable packets in between are
    left out, so the wanted frames come out bit for bit as from a decode of the whole file.
    """
    covered = np.zeros(len(table.pts) + 1, bool)  # and one behind the last, never covered
    for i, pts in enumerate(table.pts):
        if pts in wanted:
            begin = next((k for k in range(i, 0, -1) if table.entry[k] and table.pts[k] <= pts), 0)
            covered[begin:i + 1] = True
    needed = {i for i in np.flatnonzero(covered) if table.pts[i] in wanted or not table.droppable[i]}
    return needed, set(np.flatnonzero(covered[:-1] & ~covered[1:]))


def decode_needed(codec_context, packets, needed, ends):
    """Decode some of the packets; yields their frames."""
    for i, packet in enumerate(packets):
        if i in needed:
            yield from codec_context.decode(packet)
        if i in ends:
            yield from codec_context.decode(None)
            codec_context.flush_buffers()
        if i >= max(ends):
            return


class Renderer:
    """Crop, scale, flip and conversion to RGB in libavfilter: a decoded frame -> (H, W, 3) uint8. One per clip."""

    def __init__(self, clip, size, aspect):
        self.clip, self.size, self.aspect = clip, size, aspect  # aspect: width / height of a pixel
        self.box = self.seen = self.graph = None

    def build(self, frame):
        turned, width, height, aspect = frame.rotation % 360, frame.width, frame.height, self.aspect
        if turned in (90, 270):
            width, height, aspect = height, width, 1 / aspect
        if self.box is None:  # as shares of the upright picture, so it outlives a change of resolution
            self.box, self.flip = self.clip.box(width * aspect, height)
        x, y, w, h = (share * length for share, length in zip(self.box, (width, height, width, height)))
        w, h = (min(length, max(2, round(part))) for part, length in ((w, width), (h, height)))
        x, y = min(round(x), width - w), min(round(y), height - h)
        H, W = self.size
        steps = {90: [("transpose", "cclock")], 180: [("hflip", ""), ("vflip", "")], 270: [("transpose", "clock")]}.get(turned, [])
        steps = steps + [("crop", f"{w}:{h}:{x}:{y}"), ("scale", f"{W}:{H}:flags=bilinear")]
        if frame.format.name == "yuv420p":  # scaling in YUV, then the straight conversion: half the time of both at once
            steps += [("format", "yuv420p"), ("scale", f"{W}:{H}:flags=bilinear")]
        steps += [("format", "rgb24")] + ([("hflip", "")] if self.flip else [])
        self.graph = av.filter.Graph()
        self.graph.threads = 1
        nodes = [self.graph.add("buffer", video_size=f"{frame.width}x{frame.height}", pix_fmt=frame.format.name, time_base="1/1000",
                                pixel_aspect="1/1", colorspace=str(int(frame.colorspace)), range=str(int(frame.color_range)))]
        nodes += [self.graph.add(name, arguments) for name, arguments in steps] + [self.graph.add("buffersink")]
        self.graph.link_nodes(*nodes)
        self.graph.configure()

    def __call__(self, frame, out):
        looks = (frame.width, frame.height, frame.format.name, frame.rotation, frame.colorspace, frame.color_range)
        if looks != self.seen:
            self.build(frame)
            self.seen = looks
        self.graph.vpush(frame)
        out[:] = self.graph.vpull().to_ndarray()  # of a view: the one copy in Python


def read_clips(path, clips, size):
    """Several clips of one video from one decode: uint8 (len(clips), T, H, W, 3).

    A clip says when (`times(seconds)`, of its T frames) and where (`box(width, height)`, the crop and the flip): see
    `RandomClip`. size: (H, W). Raises BadVideo with the reason when the file does not give them.
    """
    out = read_needed(path, clips, size)
    return read_plainly(path, clips, size) if out is None else out


class Canvas:
    """What the clips show, and room for it. seconds (n,): when each frame of the video comes up, counted from the first."""

    def __init__(self, clips, seconds, size, stream):
        aspect = float(stream.sample_aspect_ratio or 0) or 1.0
        self.renderers = [Renderer(clip, size, aspect) for clip in clips]
        self.frames = np.stack([shown_at(clip.times(seconds), seconds) for clip in clips])  # (R, T) numbers
        self.missing = set(self.frames.flat)
        self.out = np.empty((*self.frames.shape, *size, 3), np.uint8)  # (R, T, H, W, 3)

    def paint(self, frame, number):
        """Put a frame into all of its places."""
        self.missing.remove(number)
        for clip, place in np.argwhere(self.frames == number):
            if place and self.frames[clip, place - 1] == number:  # the same frame again: a slow or a short video
                self.out[clip, place] = self.out[clip, place - 1]
            else:
                self.renderers[clip](frame, self.out[clip, place])


def read_needed(path, clips, size):
    """`read_clips` by time stamps, decoding only what is needed. None if this file does not allow it."""
    with contextlib.ExitStack() as stack:
        container, stream = stack.enter_context(open_video(path))
        table = read_packets(container, stream)
        if table is None:
            return None
        packets = table.packets
        if not packets:
            container, stream = stack.enter_context(open_video(path))
            packets = (packet for packet in container.demux(stream) if packet.size)
        seconds = (np.array(table.shown) - table.shown[0]) * float(stream.time_base)  # (n,)
        canvas = Canvas(clips, seconds, size, stream)
        wanted = {table.shown[number]: number for number in canvas.missing}
        try:
            for frame in decode_needed(stream.codec_context, packets, *needed_packets(table, wanted)):
                if wanted.get(frame.pts) in canvas.missing and not frame.is_corrupt:
                    canvas.paint(frame, wanted[frame.pts])
        except av.FFmpegError:
            return None
    return None if canvas.missing else canvas.out


def read_plainly(path, clips, size):
    """`read_clips` for any file: decode it all to learn when its frames are shown, then take the wanted ones; where the frames
    are too large to hold, from a second decode."""
    with open_video(path) as (container, stream):
        pts, held, room = [], [], HELD_BYTES
        for frame in container.decode(stream):
            pts.append(frame.pts)
            room -= sum(plane.buffer_size for plane in frame.planes)
            held.append(frame)
            if room < 0:
                held.clear()
        if not pts:
            raise BadVideo("no frame could be decoded")
        if None in pts or any(b <= a for a, b in zip(pts, pts[1:])):  # no usable time stamps: frames are shown at an even rate
            seconds = np.arange(len(pts)) / float(stream.average_rate or stream.guessed_rate or 30)
        else:
            seconds = (np.array(pts) - pts[0]) * float(stream.time_base)
    with open_video(path) as (container, stream):
        canvas = Canvas(clips, seconds, size, stream)
        for number, frame in enumerate(held or container.decode(stream)):
            if number in canvas.missing:
                canvas.paint(frame, number)
            if not canvas.missing:
                return canvas.out
    raise BadVideo("the file decodes differently each time")


class RandomClip:
    """A clip at a random time and place: T frames, `stride` thirtieths of a second apart, randomly cropped and flipped.

    area: range of the crop's share of the picture ([0.5, 1] for pre-training); aspect 3/4 to 4/3, as everywhere.
    """

    def __init__(self, rng, frames, stride, area=(0.5, 1.0), flip=True):
        self.start, self.flip = rng.random(), flip and rng.random() < 0.5
        self.rng, self.area = rng, area
        self.offsets = np.arange(frames) * stride / 30  # s

    def times(self, seconds):
        """(T,): frame i is the one on the screen at start + i * stride / 30 s. seconds (n,): when the file's frames come up."""
        return self.start * max(0.0, seconds[-1] - self.offsets[-1]) + self.offsets

    def box(self, width, height):
        """((x, y, w, h) as shares of the width and height, flip): ten tries for a crop that fits, else the middle."""
        for _ in range(10):
            area, aspect = self.rng.uniform(*self.area) * width * height, math.exp(self.rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = math.sqrt(area * aspect) / width, math.sqrt(area / aspect) / height
            if w <= 1 and h <= 1:
                return (self.rng.uniform(0, 1 - w), self.rng.uniform(0, 1 - h), w, h), self.flip
        aspect = min(max(width / height, 3 / 4), 4 / 3)
        w, h = min(1, aspect * height / width), min(1, width / aspect / height)
        return ((1 - w) / 2, (1 - h) / 2, w, h), self.flip


# ------------------------------------------------------------------------------------- from clips to batches


class VideoList:
    """Paths and labels. The paths are one block of bytes: as 300,000 strings, every worker would end up with a copy of
    them, because counting references writes to their pages."""

    def __init__(self, paths, labels=None):
        encoded = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self.block = b"".join(encoded)
        self.labels = labels  # a string per video, None for one without; or None for all

    def checksum(self):
        """Of the paths, wherever the folder that holds them all lies."""
        root = os.path.dirname(os.path.commonprefix([self[i] for i in range(len(self))]))
        return zlib.crc32(self.block.replace(os.fsencode(root), b""))

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        return os.fsdecode(self.block[self.ends[i - 1] if i else 0:self.ends[i]])


def list_videos(data, say=print):
    """A folder (flat, or one sub-folder a class) or a list file -> VideoList. Raises InputError; says what it left out."""
    if os.path.isdir(data):
        return videos_in_folder(Path(data), say)
    if os.path.isfile(data):
        return videos_in_list(Path(data))
    raise InputError(f"{str(data)[:200]}: no such folder or list file")


def videos_in_folder(folder, say):
    paths, labels, ignored, visited = [], [], Counter(), set()
    for where, folders, files in os.walk(folder, followlinks=True, onerror=lambda e: say(f"left out: {e.filename}: {e.strerror}")):
        if os.path.realpath(where) in visited:  # by way of a link
            folders.clear()
            continue
        visited.add(os.path.realpath(where))
        folders.sort()
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in VIDEO_SUFFIXES and not name.startswith("."):  # macOS puts ._clip.mp4 beside clip.mp4
                inside = os.path.relpath(where, folder)
                paths.append(os.path.join(where, name))
                labels.append(None if inside == "." else inside.split(os.sep)[0])
            else:
                ignored[suffix or name] += 1
    if ignored:
        say(f"not videos by their names, left out: {', '.join(f'{count} x {suffix}' for suffix, count in ignored.most_common(5))}")
    if not paths:
        raise InputError(f"{folder}: no video in this folder or below; looked for {' '.join(sorted(VIDEO_SUFFIXES))}")
    return VideoList(paths, labels if any(labels) else None)


def parse_line(line):
    """One line of a list file -> (path, label or None): "path label", "path,label" or "path"; quotes and spaces are allowed."""
    line = line.strip()
    if line.startswith('"') and '"' in line[1:]:
        path, label = line[1:].split('"', 1)
        return path, label.strip(", \t") or None
    lower = line.lower()
    for end in range(len(line), 0, -1):  # the longest beginning that ends like a video file, then a separator or the end
        if (end == len(line) or line[end] in ", \t") and os.path.splitext(lower[:end])[1] in VIDEO_SUFFIXES:
            return line[:end], line[end:].strip(", \t") or None
    for separator in (",", None):  # a name without a known suffix: the last word is the label
        if len(parts := line.rsplit(separator, 1)) == 2:
            return parts[0].strip(), parts[1].strip()
    return line, None


def videos_in_list(file):
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    if any("\0" in line for line in lines):
        raise InputError(f"{file}: this is not a text file; give a folder of videos or a list with one path a line")
    entries = [parse_line(line) for line in lines if line.strip()]
    if not entries:
        raise InputError(f"{file}: the list is empty; give one path a line")
    labels = [label for _, label in entries]
    if None in labels and any(labels):
        row = labels.index(None)
        raise InputError(f"{file}: {entries[row][0]!r} has no label and others have; label all lines or none")
    folder = os.path.abspath(file.parent)
    return VideoList([os.path.join(folder, path) for path, _ in entries], None if None in labels else labels)


def generator_of(*numbers):
    """Random numbers that depend on these numbers and nothing else. In training the second one keeps uses apart (below)."""
    return np.random.default_rng(numbers)


ORDER, CLIP, REPLACEMENT = range(3)


class VideoClips(Dataset):
    """clips[k]: the k-th sample of training, all its repeats from one decode, and the noise that will mask them.

    Everything random comes from (seed, k, repeat): not from the worker, the rank or the clock. Sample k is video
    perm(seed, k // n)[k % n] of n; a video that cannot be read is replaced by one that k alone determines.
    """

    def __init__(self, videos, *, seed, repeat, frames, stride, size, noise=None, area=(0.5, 1.0), flip=True, kind=RandomClip):
        self.videos, self.seed, self.repeat, self.kind = videos, seed, repeat, kind
        self.frames, self.stride, self.size, self.area, self.flip = frames, stride, size, area, flip
        self.noise = noise  # (strategy, grid), or None for no noise
        self.order = (None, None)  # the pass we are in, and its permutation

    def video_of(self, k):
        turn, place = divmod(k, len(self.videos))
        if self.order[0] != turn:
            self.order = turn, generator_of(self.seed, ORDER, turn).permutation(len(self.videos))
        return int(self.order[1][place])

    def __getitem__(self, k):
        video, bad = self.video_of(k), []
        for attempt in range(100):  # so many only where the list is useless
            generators = [generator_of(self.seed, CLIP, k, repeat) for repeat in range(self.repeat)]
            clips = [self.kind(rng, self.frames, self.stride, self.area, self.flip) for rng in generators]
            try:
                pixels = read_clips(self.videos[video], clips, self.size)  # (R, T, H, W, 3)
                break
            except BadVideo as reason:
                bad.append((video, str(reason)))
                video = int(generator_of(self.seed, REPLACEMENT, k, attempt).integers(len(self.videos)))
        else:
            pixels, video = np.zeros((self.repeat, self.frames, *self.size, 3), np.uint8), -1
        item = dict(video=torch.from_numpy(pixels), index=video, bad=bad)
        if self.noise:
            strategy, grid = self.noise
            # 1: drawn apart from the crop, which takes as many numbers as it needs.
            seeds = [int(generator_of(self.seed, CLIP, k, repeat, 1).integers(2**62)) for repeat in range(self.repeat)]
            item["noise"] = torch.cat([mask_noise(strategy, 1, grid, torch.Generator().manual_seed(s)) for s in seeds])  # (R, a, b, c)
        return item


class StepSampler:
    """Sample numbers for one rank, in order. Step s takes samples s * G to (s + 1) * G, G = batch_size * accum * world;
    its micro-batch a on rank r takes the slice a * world + r."""

    def __init__(self, steps, batch_size, accum, rank, world):
        self.steps, self.batch_size, self.accum, self.rank, self.world = steps, batch_size, accum, rank, world

    def __iter__(self):
        return (self.samples(step, micro) for step in self.steps for micro in range(self.accum))

    def samples(self, step, micro):
        first = ((step * self.accum + micro) * self.world + self.rank) * self.batch_size
        return range(first, first + self.batch_size)


def collate(items):
    """Items of VideoClips -> dict: video uint8 (B * R, T, H, W, 3), noise (B * R, a, b, c), index (B,), bad [(video, reason)]."""
    batch = {key: torch.cat([item[key] for item in items]) for key in ("video", "noise") if key in items[0]}
    return batch | dict(index=torch.tensor([item["index"] for item in items]), bad=[entry for item in items for entry in item["bad"]])


def quiet_worker(_):
    """A signal to the whole process group is for the ranks: they finish their step and then end their workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def available_cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(asked, device, ranks_here):
    """Number of data workers and the reason for it."""
    if asked is not None:
        return asked, "as asked"
    cpus = available_cpus()
    if device.type == "cpu":
        return 1, "the model computes on the same CPUs"
    reason = f"{cpus} CPUs for {ranks_here} process(es) on this machine, and at most 32: each holds two batches"
    return max(1, min(32, cpus // ranks_here)), reason


def worker_options(workers, timeout):
    """DataLoader's arguments for so many data workers. timeout: seconds to wait for one batch.

    They are forks on Linux, also where Python (from 3.14 on) would have them started by a server process: a signal to
    the whole process group would end that server, and with it the workers. And forks start at once, with the list shared.
    """
    if not workers:
        return dict(num_workers=0)
    return dict(num_workers=workers, worker_init_fn=quiet_worker, timeout=timeout,
                multiprocessing_context="fork" if sys.platform == "linux" else None)


def clip_batches(clips, sampler, workers, device, timeout):
    """A DataLoader over VideoClips in the sampler's order."""
    return DataLoader(clips, batch_sampler=sampler, collate_fn=collate, pin_memory=device.type == "cuda",
                      **worker_options(workers, timeout))


@contextlib.contextmanager
def data_errors_explained(expected):
    """Say which files the data workers were reading when one died or the timeout ran out. expected() -> their names."""
    try:
        yield
    except RuntimeError as error:  # raised by DataLoader, from its queue or from a signal handler
        if "DataLoader" not in str(error):
            raise
        first, *others = str(error).splitlines()
        reason = " ... ".join([first, *others[-1:]]).rstrip(".")
        raise InputError(f"the data workers gave no batch: {reason}. Expected were {', '.join(expected())}. "
                         f"Take a bad file out, raise --data-timeout, or find it with --check-data") from error


def end_workers():
    """For the way out after an error: workers do not hear gentler signals, and one may hang."""
    for worker in multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        worker.kill()


def to_device(batch, keys, device, copy_stream=None):
    """Start copying these tensors of a batch to the device, beside the step that is running there if there is a stream for
    it. The first one, the video, is returned as a view (B * R, 3, T, H, W)."""
    with torch.cuda.stream(copy_stream) if copy_stream else contextlib.nullcontext():
        tensors = [batch[key].to(device, non_blocking=True) for key in keys]
    if copy_stream:
        torch.cuda.current_stream().wait_stream(copy_stream)
        for tensor in tensors:
            tensor.record_stream(torch.cuda.current_stream())
    return [tensors[0].permute(0, 4, 1, 2, 3), *tensors[1:]]


# ----------------------------------------------------------------------------------------- generated videos

MOVES = ("right", "up_right", "up", "up_left", "left", "down_left", "down", "down_right")
SHAPES = {  # below 0 inside; x and y in units of the radius
    "disc": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85,
    "diamond": lambda x, y: abs(x) + abs(y) - 1.15,
    "cross": lambda x, y: np.minimum(np.maximum(abs(x) - 0.35, abs(y) - 1), np.maximum(abs(x) - 1, abs(y) - 0.35)),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.3,
}
COLOURS = {"red": (220, 40, 40), "yellow": (220, 220, 40), "green": (40, 200, 40),
           "cyan": (40, 210, 210), "blue": (50, 50, 220), "magenta": (220, 40, 200)}


def moving_shapes(rng, move, colour, frames, size):
    """One generated video: uint8 (frames, size, size, 3).

    A camera pans over a textured scene, which so moves steadily in one of eight directions; two shapes of one colour, more
    or less, drift over it on paths of their own and hide it, and now and then each other. Texture, kinds, places, sizes
    and speeds are random: no single frame tells the motion, and the motion does not tell the colour.
    """
    angle, speed = MOVES.index(move) * math.pi / 4, rng.uniform(0.5, 1.0) * size / 32  # pixels per frame
    flow = speed * np.array([math.cos(angle), -math.sin(angle)])  # x, y
    t, place = np.arange(frames)[:, None, None], np.arange(size) + 0.5

    # The texture: plane waves a quarter to one and a half pictures long, the longer the stronger, as in natural pictures.
    # Where the scene has moved by d, the phase of a wave has turned by wave * d.
    length, direction = size * np.exp(rng.uniform(math.log(0.25), math.log(1.5), 24)), rng.uniform(0, 2 * math.pi, 24)
    wave = 2 * math.pi / length * np.array([np.cos(direction), np.sin(direction)])  # (2, 24), in x and y
    strength = rng.normal(1, 0.5, (3, 24)) * np.exp(2j * math.pi * rng.random(24)) * length  # grey with a tint
    strength *= 45 * math.sqrt(2) / np.sqrt((abs(strength) ** 2).sum(1, keepdims=True))  # a spread of 45 in every channel
    at_pixel = np.exp(1j * (wave[1] * place[:, None, None] + wave[0] * place[:, None])).reshape(-1, 24)  # (H * W, 24)
    at_time = strength * np.exp(-1j * t * (flow @ wave))  # (T, 3, 24)
    video = (at_time.real @ at_pixel.real.T - at_time.imag @ at_pixel.imag.T).reshape(frames, 3, size, size)  # (T, 3, H, W)
    # Doubles until here: the same bytes whatever the order of the sums.
    video = (video + rng.uniform(60, 195, (3, 1, 1))).astype(np.float32)

    t, place = t.astype(np.float32), place.astype(np.float32)
    for _ in range(2):
        kind, tone = SHAPES[rng.choice(list(SHAPES))], np.float32(COLOURS[colour] + rng.uniform(-40, 40, 3))[:, None, None]  # (3, 1, 1)
        radius, heading, drift = rng.uniform(0.15, 0.25) * size, rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.8) * size / 32
        start, velocity = rng.uniform(0, size, 2), flow + drift * np.array([math.cos(heading), math.sin(heading)])
        x, y = (np.float32(start[axis]) + np.float32(velocity[axis]) * t for axis in (0, 1))  # (T, 1, 1)
        field = 1.4 * size  # what leaves it at one side comes in at the other
        dx = (place - x + field / 2) % field - field / 2  # (T, 1, W)
        dy = (place[:, None] - y + field / 2) % field - field / 2  # (T, H, 1)
        radius = np.float32(radius)
        inside = np.clip(np.float32(0.5) - kind(dx / radius, dy / radius) * radius, 0, 1)[:, None]  # (T, 1, H, W), its edge a pixel wide
        video += inside * (tone - video)
    return video.clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)  # (T, H, W, 3)


def write_video(path, frames, fps, options=None):
    """uint8 (T, H, W, 3) -> an H.264 file. The same frames give the same bytes: one thread, and no mbtree, whose result varies
    from run to run."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"threads": "1", "mbtree": "0"} | (options or {}))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", threads=1)))
        container.mux(stream.encode(None))


def generate_videos(folder, per_class=100, held_out=40, frames=48, size=64, seed=0):
    """Write labelled H.264 videos to folder/train and folder/val, one sub-folder a motion, complete or not at all.

    The lists folder/train_colours.csv and val_colours.csv name the same videos by their looks: another task.
    """
    folder = Path(folder)
    if folder.is_dir():
        if not (folder / "val_colours.csv").exists():
            raise InputError(f"{folder} holds other videos than this program writes; move it away, or give --data {folder}")
        return
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
    try:
        jobs = [(part, move, i) for part, count in (("train", per_class), ("val", held_out)) for i in range(count) for move in MOVES]
        lists = {"train": [], "val": []}
        for part, move, i in tqdm(jobs, desc=f"writing videos to {folder}", unit="video"):
            (unfinished / part / move).mkdir(parents=True, exist_ok=True)
            rng = generator_of(seed, ("train", "val").index(part), MOVES.index(move), i)
            colour, name = rng.choice(list(COLOURS)), f"{part}/{move}/{i:04d}.mp4"
            write_video(unfinished / name, moving_shapes(rng, move, colour, frames, size), fps=30,
                        options={"crf": "18", "preset": "veryfast"})
            lists[part].append(f"{name},{colour}\n")
        for part, lines in lists.items():
            (unfinished / f"{part}_colours.csv").write_text("".join(lines))
        unfinished.rename(folder)
    except OSError as error:
        if folder.is_dir():  # another run was faster
            return
        raise InputError(f"cannot write the generated videos to {folder}: {error.strerror}; make room, or give your own with --data"
                         ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- pictures


def text_strip(text, width):
    """Text in white on black, uint8 (16 * lines, width, 3): FFmpeg's decoder for ANSI art brings a font along."""
    strips = []
    for line in textwrap.wrap(text, max(1, width // 8)):
        decoder = av.CodecContext.create("ansi", "r")
        decoder.width, decoder.height = 8 * max(len(line) + 1, 80), 16
        strip = decoder.decode(av.Packet(line.encode("ascii")))[0].to_ndarray(format="rgb24")
        strip = np.where(strip > 0, 255, 0).astype(np.uint8)[:, :width]
        strips.append(np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0))))
    return np.concatenate(strips)


def write_png(path, image):
    """uint8 (H, W, 3) -> a PNG file."""
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = *image.shape[:2], "rgb24", Fraction(1, 1)
    packets = encoder.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")) + encoder.encode(None)
    Path(path).write_bytes(b"".join(bytes(packet) for packet in packets))


@torch.no_grad()
def picture_frames(model, video, mask_ratio, noise):
    """original | masked | reconstruction of several clips: three uint8 (B, T', H, W, 3), see `reconstruct` for T'."""
    was_training = model.training
    model.eval()
    filled, mask = model.reconstruct(video, mask_ratio, noise)  # (B, C, T', H, W), (B, t, h, w)
    model.train(was_training)
    u, p, q = model.target_patch
    pixels = video[:, :, ::model.encoder.patch[0] // u].float() / 255  # (B, C, T', H, W): the frames that were learned
    hidden = mask.repeat_interleave(u, 1).repeat_interleave(p, 2).repeat_interleave(q, 3)[:, None]  # (B, 1, T', H, W)
    masked = pixels.masked_fill(hidden, 0.5)
    return [(part.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy() for part in (pixels, masked, filled)]


def write_pictures(out, model, video, mask_ratio, noise):
    """reconstruction.png (a clip takes three rows, time runs to the right) and reconstruction.mp4 in the folder `out`."""
    parts = picture_frames(model, video, mask_ratio, noise)
    zoom = max(1, 96 // parts[0].shape[2])
    parts = [part.repeat(zoom, axis=2).repeat(zoom, axis=3) for part in parts]  # (B, T', H, W, 3)
    rows = [np.concatenate(list(part[b]), axis=1) for b in range(len(video)) for part in parts]  # each (H, T' * W, 3)
    image = np.concatenate(rows)
    borrowed = "; brightness and contrast of hidden patches borrowed from the original" if model.norm_pix else ""
    caption = f"rows: original, masked, reconstruction; {mask_ratio:.0%} hidden; time runs to the right{borrowed}"
    write_png(out / "reconstruction.png", np.concatenate([text_strip(caption, image.shape[1]), image]))
    movie = np.concatenate([np.concatenate(list(part), axis=1) for part in parts], axis=2)  # (T', B * H, 3 * W, 3)
    strip = text_strip(f"original | masked | reconstruction{borrowed}", movie.shape[2])
    movie = np.concatenate([np.broadcast_to(strip, (len(movie), *strip.shape)), movie], axis=1)
    movie = np.pad(movie, ((0, 0), (0, movie.shape[1] % 2), (0, movie.shape[2] % 2), (0, 0)))  # H.264 wants even sizes
    write_video(out / "reconstruction.mp4", np.concatenate([movie] * 4), fps=4)


# ---------------------------------------------------------------------------------------------- checkpoints


class Damaged(InputError):
    """A checkpoint whose bytes are not what was written."""


def save_checkpoint(folder, content, keep, name="last"):
    """Write folder/last.pt whole or not at all; the one before becomes last-1.pt, and so on, `keep` in all."""
    names = [folder / (f"{name}.pt" if age == 0 else f"{name}-{age}.pt") for age in range(keep)]
    unfinished = folder / f"{name}.pt.unfinished"
    try:
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        for age in range(keep - 1, 0, -1):  # the oldest first
            if names[age - 1].exists():
                names[age - 1].replace(names[age])
        unfinished.replace(names[0])
        descriptor = os.open(folder, os.O_DIRECTORY)  # the new names reach the disk too
        os.fsync(descriptor)
        os.close(descriptor)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        unfinished.unlink(missing_ok=True)
        if "DataLoader" in str(error):  # a worker has died meanwhile, which a signal handler tells at any time
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"no checkpoint could be written to {folder}: {reason}; the ones there are untouched. "
                         "Make room, then run the same command") from error


def read_checkpoint(path):
    """A checkpoint of train.py or finetune.py, on the CPU. Raises Damaged, and InputError for a file that holds code.

    torch.load does not look at the checksums in the file, so a flipped bit would be trained on: they are read first.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a checkpoint written by train.py") from error
    except Exception as error:  # a damaged zip trips its reader in a dozen ways
        raise Damaged(f"{path} is cut off or no checkpoint ({error})") from error
    if broken:
        raise Damaged(f"{path} is damaged in {broken}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # in the checkpoints of mae_st; holds plain values
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: it holds more than tensors and plain values, so loading it could run code") from error
    except Exception as error:  # what is no pickle of tensors trips torch in as many ways
        raise InputError(f"{path} is no checkpoint ({type(error).__name__}); give one that train.py wrote") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no checkpoint: it holds a {type(content).__name__}; give one that train.py wrote")
    return content


def find_checkpoint(folder):
    """The newest undamaged checkpoint of a run, as (path, content), or (None, None) where there is none."""
    paths = sorted(folder.glob("last*.pt"), key=lambda path: (len(path.name), path.name))  # last.pt, last-1.pt, ...
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except Damaged as problem:
            print(f"{problem}; trying the checkpoint before it")
    if paths:
        raise InputError(f"every checkpoint in {folder} is damaged; move them away to begin anew")
    return None, None


def load_init(path):
    """The content of the checkpoint given as --init: one of ours, or a released one in the form of ours."""
    content = read_checkpoint(path)
    content.pop("optimizer", None)  # two thirds of the file
    try:
        return from_released(content)
    except ValueError as problem:
        raise InputError(f"--init {path}: {problem}; give another checkpoint") from problem


# ------------------------------------------------------------------------------------ processes and precision


class Machine(NamedTuple):
    device: torch.device
    rank: int
    world: int
    ranks_here: int  # processes on this machine

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)


def start(device_name):
    """Find the device and, under torchrun, the other processes. Without torchrun: one process, the same code."""
    rank, local, world, here = (int(os.environ.get(key, default)) for key, default in
                                (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    reason = "as asked"
    if device_name == "auto":
        device_name, reason = ("cuda", "a GPU is there") if torch.cuda.is_available() else ("cpu", "torch sees no GPU")
    if device_name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU; choose --device cpu, or install a torch build for CUDA")
    if device_name == "cuda" and local >= torch.cuda.device_count():
        raise InputError(f"process {local} of this machine has no GPU of its own: "
                         f"start at most {torch.cuda.device_count()} with --nproc_per_node")
    device = torch.device(device_name, local) if device_name == "cuda" else torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True  # for what is float32, see `precision_name`
    if world > 1:
        # torchrun keeps its store over restarts: without a prefix the new processes would look for the dead ones' addresses.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", next(dist.rendezvous("env://"))[0])
        # A dead process is noticed by torchrun, and at once; this is for slow ones, such as one that waits --data-timeout for its batch.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(hours=2))
    machine = Machine(device, rank, world, here)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{available_cpus()} CPUs, {torch.get_num_threads()} threads"
    machine.say(f"device: {device.type} ({reason}), {name}, {world} process(es); "
                f"Python {platform.python_version()}, torch {torch.__version__}, PyAV {av.__version__}")
    return machine


def choose_precision(asked, device):
    """(dtype for autocast or None, reason)."""
    if asked == "auto":
        if device.type == "cpu":
            return None, "exact, on a CPU; --amp bf16 is faster on some"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes in bfloat16"
        return None, "this GPU has no bfloat16; --amp fp16 is faster"
    if asked == "fp16" and device.type == "cpu":
        raise InputError("--amp fp16 needs a GPU; on a CPU choose bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[asked], "as asked"


def precision_name(dtype, device):
    """In words; GPUs from Ampere on multiply what is float32 as TF32, see `start`."""
    if dtype is None and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return "float32 (TF32)"
    return str(dtype or torch.float32).removeprefix("torch.")


def of_all_processes(items, machine):
    """The lists of all processes, one after the other, on each of them."""
    if machine.world == 1:
        return items
    lists = [None] * machine.world
    dist.all_gather_object(lists, items)
    return [item for one in lists for item in one]


class StopRequest:
    """SIGTERM and SIGINT ask for the end: the step is finished on all ranks, then saved. A second SIGINT ends at once, and so does
    either once the last step is saved."""

    def __init__(self):
        self.signal, self.done, self.first = 0, False, None  # first: when the first SIGINT came
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, _):
        self.signal = number
        if self.done:
            self.end(f"stopped by {signal.Signals(number).name}; the steps are done and saved, "
                     "the same command goes on with what comes after them")
        if number == signal.SIGINT:
            self.first = self.first or time.monotonic()
            if time.monotonic() - self.first > 0.5:  # torchrun passes the same Ctrl-C on, at once
                self.end("stopped by a second SIGINT, nothing saved since the last checkpoint")

    def end(self, reason):
        with contextlib.suppress(RuntimeError):  # where the signal came in the middle of a print
            sys.stdout.flush()
        os.write(2, f"\n{reason}\n".encode())
        end_workers()
        os._exit(128 + self.signal)


def mark(device):
    """A point in time: on a GPU one in its own queue of work, which the clock on the wall knows nothing of."""
    if device.type != "cuda":
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


# --------------------------------------------------------------------------------------------------- recipe


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over the first share `warmup` of the steps, then half a cosine to 0. A function of the step alone."""
    warm = warmup * steps
    if step < warm:
        return peak * (step + 1) / (warm + 1)  # above 0 from the first step on, and at the peak when warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def decay_groups(model, weight_decay):
    """Weight decay for matrices and tables; none for biases and other 1-d parameters."""
    return [dict(params=[parameter for parameter in model.parameters() if parameter.dim() > 1], weight_decay=weight_decay),
            dict(params=[parameter for parameter in model.parameters() if parameter.dim() <= 1], weight_decay=0.0)]


def update(optimizer, scaler, parameters, clip, loss):
    """Clip the gradient and step; nothing moves if the loss or the gradient is not finite. Returns the gradient's norm."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if not scaler.is_enabled():  # with a scaler its own check does the same
        optimizer.found_inf = (~torch.isfinite(norm + loss)).float()  # read by the fused AdamW on the device: no waiting
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


class Skipped:
    """Counts videos that could not be read, names each once, and stops a run whose first videos mostly fail."""

    def __init__(self, videos, machine):
        self.videos, self.machine, self.tried, self.failed, self.reasons = videos, machine, 0, 0, {}

    def note(self, batch):
        self.tried += len(batch["index"]) + len(batch["bad"])
        self.failed += len(batch["bad"])
        for video, reason in batch["bad"]:
            if video not in self.reasons:
                self.reasons[video] = reason
                tqdm.write(f"skipped, another video takes its place: {self.videos[video]}: {reason}")
        gave_up = (batch["index"] < 0).any()
        if gave_up or (self.tried <= 64 and self.failed >= 8 and self.failed > self.tried / 2):
            some = "; ".join(f"{self.videos[video]}: {reason}" for video, reason in list(self.reasons.items())[:3])
            raise InputError(f"{self.failed} of the first {self.tried} videos cannot be read, so the list is probably wrong: {some}")

    def summary(self):
        """All ranks together: the list of everything that was skipped, on the first."""
        reasons = dict(of_all_processes(list(self.reasons.items()), self.machine))
        if reasons:
            self.machine.say(f"{len(reasons)} of {len(self.videos)} videos could not be read:")
            for video, reason in sorted(reasons.items()):
                self.machine.say(f"  {self.videos[video]}: {reason}")


class Log:
    """log.jsonl, one object a step, written line by line; and the progress bar. After a resume no step stands twice."""

    def __init__(self, out, machine, start, steps):
        path = out / "log.jsonl"
        if machine.rank == 0:
            kept = [line for line in path.read_text(errors="replace").splitlines() if is_row_before(line, start)] if path.exists() else []
            path.with_suffix(".unfinished").write_text("".join(line + "\n" for line in kept))
            path.with_suffix(".unfinished").replace(path)
        self.file = open(path if machine.rank == 0 else os.devnull, "a", buffering=1)
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=machine.rank > 0, dynamic_ncols=True, mininterval=0.5)

    def write(self, **row):
        self.file.write(as_line(row))

    def row(self, **row):
        self.write(**row)
        text = "loss {loss:.4f} lr {lr:.2e} clips/s {clips_per_s:.1f} wait {data_wait:.0%}"
        self.bar.set_postfix_str(text.format(**row), refresh=False)
        self.bar.update()

    def close(self):
        self.bar.close()
        self.file.close()


def as_line(row):
    """A row of log.jsonl: what is not finite becomes null, as JSON has no word for it."""
    def plain(value):
        if not isinstance(value, float):
            return value
        return None if not math.isfinite(value) else round(value, 6) if abs(value) > 1e-3 else value

    return json.dumps({key: plain(value) for key, value in row.items()}) + "\n"


def is_row_before(line, step):
    """Is this line of the log whole and of a step up to `step`?"""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False  # cut off by a crash


# --------------------------------------------------------------------------------------------- the training


class Pretraining:
    """One run: what it needs, and what it does at a step. `finetune.py` puts its own model, data and loss into the same loop."""

    DECIDES = "model frames stride size patch mask_ratio strategy target norm_pix repeat seed lr weight_decay warmup clip init"
    BETAS = 0.9, 0.95

    def __init__(self, args, machine):
        self.args, self.machine, self.out = args, machine, Path(args.out)
        self.device = machine.device
        self.videos = self.find_videos()
        self.videos_per_step = args.batch_size * args.accum * machine.world
        self.steps = args.steps or math.ceil(args.epochs * len(self.videos) / self.videos_per_step)
        self.peak_lr = args.lr * self.videos_per_step / 512  # 512 videos, however many clips of each; fine-tuning counts clips
        self.save_every = args.save_every or math.ceil(self.steps / 20)
        self.dtype, self.precision_reason = choose_precision(args.amp, self.device)
        self.workers, self.workers_reason = choose_workers(args.workers, self.device, machine.ranks_here)
        torch.manual_seed(args.seed)
        self.model_args, self.model = self.make_model()
        self.optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.peak_lr, betas=self.BETAS, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step, self.preview = 0, None
        self.clips = self.make_clips(args.repeat)
        self.skipped = Skipped(self.videos, machine)

    def find_videos(self):
        return list_videos(self.args.data, self.machine.say)

    def make_model(self):
        args, (height, width) = self.args, self.args.size
        model_args = SIZES[args.model] | dict(frames=args.frames, height=height, width=width, patch=args.patch, target=args.target,
                                              norm_pix=args.norm_pix, checkpointing=args.checkpointing)
        model = build(model_args)
        self.seen, self.hidden = count_tokens(model, args.strategy, args.mask_ratio)
        if args.init:
            load_weights(model, load_init(args.init)["model"], args.init)
        return model_args, model.to(self.device)

    def parameter_groups(self):
        return decay_groups(self.model, self.args.weight_decay)

    def make_clips(self, repeat):
        args = self.args
        return VideoClips(self.videos, seed=args.seed, repeat=repeat, frames=args.frames, stride=args.stride, size=args.size,
                          noise=(args.strategy, self.model.encoder.grid))

    def rate(self, step):
        return learning_rate(step, self.steps, self.peak_lr, self.args.warmup)

    def loss(self, model, video, noise):
        return model(video, self.args.mask_ratio, noise)

    # -- state

    def identity(self):
        """The arguments that decide what is computed, for a look at them on resuming."""
        names = {name: getattr(self.args, name) for name in self.DECIDES.split()}
        return names | dict(precision=str(self.dtype), steps=self.steps, videos_per_step=self.videos_per_step, videos=len(self.videos),
                            checksum_of_list=self.videos.checksum())

    def state(self):
        return dict(step=self.step, identity=self.identity(), world=self.machine.world, torch=str(torch.__version__),
                    model_args=self.model_args, model=self.model.state_dict(),
                    optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())

    def resume(self):
        """Go on from the newest good checkpoint in --out, the same one on every rank; stop if the arguments have changed."""
        path, content = find_checkpoint(self.out) if self.machine.rank == 0 else (None, None)
        path = of_all_processes([path], self.machine)[0]  # the first one's
        if path is None:
            return
        content = content or read_checkpoint(path)
        before, now = content.get("identity"), self.identity()
        if before is None or content.keys() != self.state().keys():
            raise InputError(f"{path} is no checkpoint of such a run; choose another --out")
        changed = [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
        if changed:
            if content["world"] != self.machine.world:
                changed.append(f"set --batch-size x --accum x processes to {before.get('videos_per_step')}, "
                               f"as it was with {content['world']} process(es)")
            raise InputError(f"--out {self.out} holds a run with other arguments: {'; '.join(changed)}. "
                             "Go on with the old ones, or choose another --out")
        self.restore(content)
        self.machine.say(f"going on from {path} after step {self.step} of {self.steps}")
        if content["world"] != self.machine.world:
            self.machine.say(f"{content['world']} process(es) before, {self.machine.world} now: the same videos in the same order, "
                             "but no longer bit for bit the same run")

    def restore(self, content):
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.step = content["step"]

    def save(self):
        if self.machine.rank == 0:
            save_checkpoint(self.out, self.state(), self.args.keep)
            if self.preview is None:
                self.preview = collate([self.make_clips(1)[k] for k in range(4)])
            video, noise = to_device(self.preview, ("video", "noise"), self.device)
            write_pictures(self.out, self.model, video, self.args.mask_ratio, noise)

    # -- the loop

    def run(self):
        """Train to the last step, or to a signal; returns the exit status."""
        args, machine = self.args, self.machine
        make_folder(self.out)
        self.lock = hold_folder(self.out) if machine.rank == 0 else None
        self.resume()
        self.report()
        stop = StopRequest()
        if self.step < self.steps:
            self.sampler = StepSampler(range(self.step, self.steps), args.batch_size, args.accum, machine.rank, machine.world)
            self.expected = self.sampler.samples(self.step, 0)
            with data_errors_explained(lambda: self.names(self.expected)):  # a worker may die at any time from here
                self.batches = iter(clip_batches(self.clips, self.sampler, self.workers, self.device, args.data_timeout))
                self.train(stop)
            self.batches = None  # ends the workers
        self.skipped.summary()
        stop.done = self.step == self.steps
        if stop.signal:
            machine.say(f"stopped by {signal.Signals(stop.signal).name} after step {self.step} of {self.steps}, saved; "
                        "the same command goes on from here")
            return 128 + stop.signal
        self.conclude()
        return 0

    def conclude(self):
        if not (self.out / "reconstruction.png").exists():  # killed between the last checkpoint and its pictures
            self.save()
        self.machine.say(f"done: {self.steps} steps; {self.out}/last.pt, log.jsonl, reconstruction.png and reconstruction.mp4")

    def report(self):
        args, say = self.args, self.machine.say
        say(f"arguments: {' '.join(f'{key}={value}' for key, value in vars(args).items() if not key.endswith('_reason'))}")
        say(f"videos: {len(self.videos)}, the first as read: " + "; ".join(self.describe(i) for i in range(min(3, len(self.videos)))))
        say(self.describe_model())
        say(f"precision: {precision_name(self.dtype, self.device)} ({self.precision_reason}); "
            f"compile: {args.compile} ({args.compile_reason}); data workers: {self.workers} ({self.workers_reason})")
        say(f"batch: {args.batch_size} videos x {args.accum} micro-batches x {self.machine.world} process(es) "
            f"= {self.videos_per_step} videos a step, x {args.repeat} clips = {self.videos_per_step * args.repeat} clips; "
            f"batch size {args.batch_reason}")
        if self.videos_per_step > len(self.videos):
            say("a step takes more videos than there are: "
                f"each is taken about {self.videos_per_step / len(self.videos):.1f} times a step, as different clips")
        passes = self.steps * self.videos_per_step / len(self.videos)
        say(f"length: {self.steps} steps = {passes:.1f} passes over the list = {passes * args.repeat:.1f} effective epochs, "
            f"warm-up {args.warmup * self.steps:.0f} steps; lr {args.lr:g} x {self.peak_lr / args.lr * 512:.0f} / 512 "
            f"= {self.peak_lr:.3g}; a checkpoint every {self.save_every} steps")

    def names(self, samples):
        """The paths of the videos that these samples stand for, sorted."""
        return sorted({self.videos[self.clips.video_of(k)] for k in samples})

    def describe_model(self):
        args, model, tokens = self.args, self.model, self.seen + self.hidden
        return (f"model: {args.model}, encoder {count(model.encoder):.1f} M of {count(model):.1f} M parameters; "
                f"sees {self.seen} of {tokens} tokens, {self.hidden / tokens:.1%} hidden ({args.strategy})")

    def describe(self, i):
        label = self.videos.labels and self.videos.labels[i]
        return self.videos[i] + (f" (label {label})" if label else " (no label)")

    def train(self, stop):
        args, machine = self.args, self.machine
        model = torch.compile(self.model) if args.compile else self.model
        if machine.world > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            # A compiled model is cut where a bucket of gradients is full: at the default of 25 MB that is within every block of ViT-L.
            model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, bucket_cap_mb=100)
        self.copy_stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        self.log = Log(self.out, machine, self.step, self.steps)
        late, begin = None, mark(self.device)
        self.idle_from = begin  # since then the device has had nothing to do
        try:
            for step in self.sampler.steps:
                self.idle = []  # (from, to) of the times in this step in which it waited for a batch
                status = self.optimizer_step(model, step, stop)
                end = self.idle_from = mark(self.device)
                stopping = late is not None and self.check_step(*late)  # looks at the step before, while this one runs
                late, begin = (step, status, begin, end, self.idle), end
                if stopping or (step + 1) % self.save_every == 0 or step + 1 == self.steps:
                    stopping = self.check_step(*late) or stopping  # nothing is saved before its steps were looked at
                    late = None
                    self.step = step + 1
                    self.save()
                    begin = self.idle_from = mark(self.device)
                    if stopping:
                        stop.signal = stop.signal or signal.SIGTERM  # another rank was asked to stop
                        return
        finally:
            self.log.close()

    def optimizer_step(self, model, step, stop):
        """All micro-batches of a step and the update. Returns loss, gradient norm, not finite?, asked to stop? On a GPU they are on
        their way still: `check_step` reads them a step later, when the mark behind this step is reached."""
        args, total = self.args, torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step) * group.get("scale", 1)
        for micro in range(args.accum):
            inputs = self.next_batch(step, micro)
            last = micro == args.accum - 1
            with contextlib.nullcontext() if last or self.machine.world == 1 else model.no_sync():
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    loss = self.loss(model, *inputs) / args.accum
                self.scaler.scale(loss).backward()
            total += loss.detach()
            self.idle_from = mark(self.device)
        norm = update(self.optimizer, self.scaler, self.model.parameters(), args.clip, total)
        finite = torch.isfinite(total + norm)
        if self.scaler.is_enabled():  # some norms overflow until the scale has come down, but not for ever
            finite = torch.isfinite(total) & (finite | (self.scaler._scale >= 1))
        status = torch.stack([total, norm, (~finite).float(), torch.full((), float(bool(stop.signal)), device=self.device)])
        if self.machine.world > 1:
            status[:2] /= self.machine.world  # the loss becomes the mean; the norm is the same everywhere, so the sum is the norm again
            dist.all_reduce(status)
        return status.to("cpu", non_blocking=True)

    def fetch(self, step, micro):
        """The next batch of the data workers, on the CPU."""
        self.expected = self.sampler.samples(step, micro)
        batch = next(self.batches)
        self.idle.append((self.idle_from, mark(self.device)))
        self.skipped.note(batch)
        return batch

    def next_batch(self, step, micro):
        video, noise = to_device(self.fetch(step, micro), ("video", "noise"), self.device, self.copy_stream)
        if (step, micro) == (self.sampler.steps[0], 0) and self.machine.rank == 0:
            patches = self.model.encoder.patches(video)
            target, _ = self.model.targets(patches, self.model.split(patches, self.args.mask_ratio, noise)[1])
            self.machine.say(f"loss of always predicting the mean: {target.var(correction=0).item():.4f} on the first batch; "
                             "training should get well below")
        return video, noise

    def check_step(self, step, status, begin, end, idle):
        """Look at a step's numbers: log them, stop everything if they are not finite. Returns whether to stop."""
        seconds = elapsed(begin, end)  # waits until the numbers are here
        (loss, norm, bad, asked), args = status.tolist(), self.args
        memory = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None
        row = dict(step=step + 1, epoch=(step + 1) * self.videos_per_step / len(self.videos),
                   loss=loss, lr=self.rate(step), grad_norm=norm, clips_per_s=self.videos_per_step * args.repeat / seconds,
                   data_wait=sum(elapsed(*gap) for gap in idle) / seconds, peak_mem_gb=memory)
        if bad:
            samples = range(step * self.videos_per_step, (step + 1) * self.videos_per_step)
            names = self.names(samples)
            self.log.row(**row, samples=[samples[0], samples[-1]], videos=names)
            raise InputError(f"loss {loss} and gradient norm {norm} at step {step + 1} are not finite; nothing was saved since, "
                             f"all checkpoints are kept. The batch is in {self.out}/log.jsonl: {', '.join(names[:8])}"
                             f"{' ...' if len(names) > 8 else ''}. Lower --lr, or try --amp off")
        self.log.row(**row)
        return asked > 0


def count(module):
    """Millions of parameters."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@contextlib.contextmanager
def writable(what):
    """An error of the disk while `what`, a flag and its value, is written becomes one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what} cannot be written: {error.strerror}; make room, or choose another place") from error


def make_folder(out):
    """The folder of --out, there and writable."""
    with writable(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK | os.X_OK):
        raise InputError(f"--out {out} cannot be written: no permission, or a read-only disk; choose another folder")


def hold_folder(out):
    """Keep other runs out of this folder for as long as the returned file is open in this process.

    lockf, not flock: data workers that outlive a killed run by some seconds must not hold the lock against its successor.
    """
    with writable(f"--out {out}"):
        lock = (out / "lock").open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError as error:
        raise InputError(f"--out {out} is in use by another run; wait for it, or choose another folder") from error
    except OSError as error:
        raise InputError(f"--out {out} cannot be locked against other runs: {error.strerror}; choose a folder on another disk") from error


def build(model_args, kind=MaskedAutoencoder):
    try:
        return kind(**model_args)
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise InputError(f"no such model can be built: {str(error).splitlines()[0]}") from error


def count_tokens(model, strategy, mask_ratio):
    """How many tokens of a clip are seen, and how many hidden."""
    try:
        keep, hide = split_tokens(mask_noise(strategy, 1, model.encoder.grid), model.encoder.grid, mask_ratio)
    except ValueError as error:
        raise InputError(str(error)) from error
    return keep.shape[1], hide.shape[1]


def load_weights(model, weights, path):
    """Weights of a checkpoint of the same shapes; a difference is an error that names it."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit this model: {' '.join(str(error).split())[:500]}") from error


# ------------------------------------------------------------------------------------------- other commands


def reconstruct(args, machine):
    """Pictures of one video, from a checkpoint."""
    if not args.init:
        raise InputError("--reconstruct needs a trained model: give a checkpoint with --init")
    content = load_init(args.init)
    model = build(content["model_args"]).to(machine.device)
    load_weights(model, content["model"], args.init)
    frames, *size = model.encoder.video_size
    paper = dict(mask_ratio=0.9, strategy="agnostic", stride=4)  # for a released checkpoint
    given = {key: getattr(args, key) for key in paper if getattr(args, key) is not None}
    settings = paper | content.get("identity", {}) | given
    ratio, strategy, stride = (settings[key] for key in paper)
    count_tokens(model, strategy, ratio)  # complains about a ratio that cannot be
    clips = [RandomClip(generator_of(args.seed, CLIP, 0, i), frames, stride) for i in range(4)]
    try:
        video = read_clips(args.reconstruct, clips, tuple(size))  # (4, T, H, W, 3)
    except BadVideo as reason:
        raise InputError(f"--reconstruct {args.reconstruct}: {reason}") from reason
    noise = mask_noise(strategy, 4, model.encoder.grid, torch.Generator().manual_seed(args.seed))
    out = Path(args.out)
    make_folder(out)
    write_pictures(out, model, torch.from_numpy(video).to(machine.device).permute(0, 4, 1, 2, 3), ratio, noise.to(machine.device))
    machine.say(f"{out}/reconstruction.png and .mp4: {ratio:.0%} hidden ({strategy})")
    return 0


def what_is_wrong(path):
    """Why a file cannot be read to its end, or None."""
    try:
        with open_video(path) as (container, stream):
            return None if sum(1 for _ in container.decode(stream)) else "no frame could be decoded"
    except BadVideo as reason:
        return str(reason)


def check_data(args):
    """Decode every file once; name the bad ones."""
    videos, bad = list_videos(args.data), []
    workers = available_cpus() if args.workers is None else args.workers
    # The workers apply collate_fn to each path.
    reasons = iter(DataLoader(videos, batch_size=None, collate_fn=what_is_wrong, **worker_options(workers, args.data_timeout)))
    for path in tqdm(videos, unit="video", dynamic_ncols=True):
        with data_errors_explained(lambda: [path]):
            reason = next(reasons)
        if reason:
            bad.append(f"{path}: {reason}")
    print(*bad, f"{len(videos)} videos, {len(bad)} bad", sep="\n")
    return 1 if bad else 0


# ------------------------------------------------------------------------------------------------ arguments


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # a default that depends on something else stands in the text
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        raise InputError(f"{message}; see --help")


def numbers(count_allowed, what):
    """For argparse: "2x16x16" or "224" -> a tuple of positive whole numbers."""
    def parse(text):
        parts = text.lower().replace(",", "x").split("x")
        if len(parts) not in count_allowed or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return tuple(int(part) for part in parts)
    return parse


def between(low, high, kind=float):
    """For argparse: a number in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number from {low} to {high}")
        return value
    return parse


def square(text):
    sides = numbers((1, 2), "a size such as 224 or 192x256 (height x width)")(text)
    return sides * 2 if len(sides) == 1 else sides


whole, positive = between(1, 10**9, int), between(1e-12, 1e9)
three_sizes = numbers((3,), "three sizes such as 2x16x16 (frames x height x width)")

# Without --data: a setting in which two CPU cores learn to see motion in three minutes. Flags given win over these.
DEMO = dict(model="tiny", frames=8, stride=5.0, size=(32, 32), patch=(2, 8, 8), mask_ratio=0.5, norm_pix=False, steps=1500,
            batch_size=8, repeat=4, lr=0.384, warmup=0.1, clip=1.0)  # 0.384 per 512 videos: 0.006


def in_flags(settings):
    """How one would write them on the command line."""
    def flag(key, value):
        name = key.replace("_", "-")
        if isinstance(value, bool):
            return f"--{name}" if value else f"--no-{name}"
        text = "x".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else value
        return f"--{name} {text}"

    return " ".join(flag(key, value) for key, value in settings.items())


def shared_arguments(description):
    """A parser with the flags that train.py and finetune.py share, and its groups: data, method, recipe, run."""
    parser = Parser(description)
    data = parser.add_argument_group("data")
    data.add_argument("--data", help="folder of videos (class sub-folders or flat) or list file; without it a small set is written")
    data.add_argument("--frames", type=whole, default=16, help="frames of a clip")
    data.add_argument("--stride", type=positive, default=4, help="time between frames, in thirtieths of a second")
    data.add_argument("--size", type=square, default=(224, 224), help="height and width of a clip, in pixels: 224 or 192x256")
    data.add_argument("--repeat", type=whole, default=4, help="clips taken from each decoded video")
    data.add_argument("--workers", type=between(0, 1024, int), help="data worker processes per training process (default: from the CPUs)")
    data.add_argument("--data-timeout", type=whole, default=300, help="seconds to wait for a batch before giving up")
    method = parser.add_argument_group("method")
    method.add_argument("--model", choices=SIZES, default="large", help="size")
    method.add_argument("--patch", type=three_sizes, default=(2, 16, 16), help="frames x height x width of a patch")
    method.add_argument("--checkpointing", action="store_true", help="save memory by computing activations again in the backward pass")
    recipe = parser.add_argument_group("recipe (the paper's)")
    recipe.add_argument("--epochs", type=positive, default=200, help="passes over the list; effective epochs are these x repeat")
    recipe.add_argument("--steps", type=whole, help="optimizer steps in all, in place of --epochs")
    recipe.add_argument("--batch-size", type=whole, help="videos per process and micro-batch (default: 16 on a GPU, 2 on a CPU)")
    recipe.add_argument("--accum", type=whole, default=1, help="micro-batches per step")
    recipe.add_argument("--weight-decay", type=between(0, 10), default=0.05, help="of matrices and tables")
    recipe.add_argument("--clip", type=positive, default=0.02, help="largest norm of the gradient")
    recipe.add_argument("--seed", type=between(0, 2**31, int), default=0, help="everything random follows from it")
    run = parser.add_argument_group("run")
    run.add_argument("--init", help="checkpoint to take the weights from")
    run.add_argument("--save-every", type=whole, help="steps between checkpoints (default: a twentieth of the run)")
    run.add_argument("--keep", type=whole, default=2, help="checkpoints to keep")
    run.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    run.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="reduced precision")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)")
    return parser, data, method, recipe, run


def parse_arguments(argv=None):
    parser, _, method, recipe, run = shared_arguments(__doc__.split("\n\n")[0])
    method.add_argument("--mask-ratio", type=float, default=0.9, help="share of the tokens that is hidden")
    method.add_argument("--strategy", choices=STRATEGIES, default="agnostic", help="what is hidden together")
    method.add_argument("--target", choices=("frame", "patch"), default="frame", help="predict the first frame of each patch, or all")
    method.add_argument("--norm-pix", action=argparse.BooleanOptionalAction, default=True, help="normalise each target patch")
    recipe.add_argument("--lr", type=positive, default=1.6e-3, help="learning rate per 512 videos a step; scaled linearly")
    recipe.add_argument("--warmup", type=between(0, 1), default=0.15, help="share of the steps (120 of 800 epochs)")
    run.add_argument("--out", default="runs/pretrain", help="folder of the run; if it holds one, that one goes on")
    run.add_argument("--reconstruct", metavar="VIDEO", help="only show what --init makes of this video")
    run.add_argument("--check-data", action="store_true", help="only read every file of --data once and name the bad ones")
    parser.epilog = f"Without --data, to show that it works: {in_flags(DEMO)}."
    given = parser.parse_known_args(argv, argparse.Namespace(epochs=None))[0]  # None: --epochs was not given
    if given.reconstruct:  # the checkpoint knows better
        parser.set_defaults(mask_ratio=None, strategy=None, stride=None, out="runs/reconstruct")
    elif given.data is None:
        parser.set_defaults(**DEMO | (dict(steps=None) if given.epochs else {}))
    return parser.parse_args(argv)


def complete(args, machine):
    """Fill in what depends on the machine, with the reason for it."""
    gpu = machine.device.type == "cuda"
    args.batch_reason = args.compile_reason = "as asked"
    if args.batch_size is None:
        args.batch_size, args.batch_reason = (16, "for a GPU") if gpu else (2, "for a CPU")
    if args.compile is None:
        args.compile, args.compile_reason = gpu, "the default on a GPU" if gpu else "gains nothing on a CPU"


def demo_videos(machine):
    """The folder of the generated videos, written by the first process if it is not there."""
    if machine.rank == 0:
        generate_videos("data/moving_shapes")
    if machine.world > 1:
        dist.barrier()
    return "data/moving_shapes"


def main(argv=None):
    args = parse_arguments(argv)
    machine = start(args.device)
    complete(args, machine)
    if args.reconstruct:
        return reconstruct(args, machine)
    args.data = args.data or f"{demo_videos(machine)}/train"
    if args.check_data:
        return check_data(args)
    return Pretraining(args, machine).run()


def run_script(main):
    """Run a script's main(). An InputError becomes one line; under torchrun it also lands in torchrun's own summary."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # the name of a file may be no text
    status, said = 1, None
    try:
        try:
            status = record(main)() if "TORCHELASTIC_ERROR_FILE" in os.environ else main()
        except BaseException:
            end_workers()  # at once: with the last reference to the exception their loader would go, and wait for them
            raise
    except KeyboardInterrupt:
        status, said = 130, "stopped by SIGINT"
    except InputError as error:
        said = f"error: {error}"
    except torch.OutOfMemoryError as error:
        said = (f"error: out of GPU memory ({str(error).splitlines()[0]}); in training lower --batch-size and raise --accum "
                "by as much, or add --checkpointing; elsewhere choose a smaller --size")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        said = f"error: {error.filename or 'the folder of the run'}: {error.strerror}; make room, then run the same command"
    if said:
        print(said, file=sys.stderr)
    if dist.is_initialized() and status in (0, 130, 143):
        dist.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    run_script(main)
