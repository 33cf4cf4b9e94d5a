"""Pre-train a spatiotemporal masked autoencoder on video files.

    python train.py                                    no data, no GPU: writes a small set of videos and trains on it
    python train.py --data my_videos --model base      a folder, or a list file with one "path label" or "path" a line
    torchrun --nproc_per_node=8 train.py --data kinetics/train.csv --model large      the paper's recipe
    python train.py --reconstruct clip.mp4 --init runs/pretrain/last.pt               look at a reconstruction

From top to bottom: videos into clips, clips into batches, the generated videos, pictures, checkpoints, the run.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import stat
import sys
import time
import zipfile
import zlib
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.distributed as dist
from av.stream import Disposition
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mae_st import SIZES, STRATEGIES, MaskedAutoencoder, mask_noise, split_tokens


class InputError(Exception):
    """Something the person can put right. The scripts print it as one line: what was given, what is allowed, what to change."""


class BadVideo(Exception):
    """A file that yields no clip. Training takes another one in its place and says so."""


# --------------------------------------------------------------------------------- from a video file to clips

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".ogv"}
# Only real containers and only this very file: a playlist named x.mp4 must not open other files or the network.
SAFE_OPEN = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,h264,hevc,ivf,m4v,obu",
             "protocol_whitelist": "file"}
MAX_PIXELS = 2**25  # 8K video has 33.2 million
SLACK = 1e-3  # s; Matroska rounds time stamps to milliseconds


class Packets(NamedTuple):
    """What is known of a stream without decoding it."""
    packets: list  # in decoding order
    pts: list  # time stamp of each
    entry: list  # True: decoding may begin here, and everything shown later comes out right
    droppable: list  # True: no other frame is predicted from this one


@contextlib.contextmanager
def open_video(path):
    """The container and its main video stream, set to decode in this thread alone. Raises BadVideo."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BadVideo("not a regular file")
    with av.open(os.path.abspath(path), options=SAFE_OPEN, metadata_errors="ignore") as container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic and s.codec_context]
        if not streams:
            raise BadVideo("no video stream")
        stream = max(streams, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height))
        if not 0 < stream.width * stream.height <= MAX_PIXELS:
            raise BadVideo(f"frames of {stream.width} x {stream.height}, at most {MAX_PIXELS} pixels are read")
        stream.codec_context.thread_count = 1
        yield container, stream


def nal_headers(data, length_size):
    """The positions of the NAL unit headers in an H.264 or HEVC packet (bytes).

    length_size: bytes of the length before each unit (MP4, Matroska), 0 for start codes (MPEG-TS, raw).
    """
    if length_size:
        at = 0
        while at + length_size < len(data):
            yield at + length_size
            at += length_size + int.from_bytes(data[at:at + length_size], "big")
    else:
        at = data.find(b"\0\0\1")
        while 0 <= at < len(data) - 4:
            yield at + 3
            at = data.find(b"\0\0\1", at + 3)


def h264_packet(data, length_size):
    """(does decoding restart here, may it be dropped) of one H.264 packet.

    Slices are NAL types 1 to 5, 5 is IDR; nal_ref_idc = 0 says that nothing refers to the picture (7.4.1 of H.264).
    """
    slices = [data[at] for at in nal_headers(data, length_size) if 1 <= data[at] & 31 <= 5]
    return any(header & 31 == 5 for header in slices), bool(slices) and not any(header & 0x60 for header in slices)


def hevc_layer(data, length_size):
    """(temporal layer, is it a sub-layer non-reference picture) of one HEVC packet: table 7-1 of H.265."""
    slices = [(data[at] >> 1 & 63, data[at + 1] & 7) for at in nal_headers(data, length_size) if data[at] >> 1 & 63 < 32]
    return max((layer for _, layer in slices), default=0), bool(slices) and all(kind <= 14 and kind % 2 == 0 for kind, _ in slices)


def read_packets(container, stream):
    """All packets of the stream, or None if their time stamps cannot be trusted (missing, doubled, or AVI, which has none)."""
    codec, extradata = stream.codec_context.name, bytes(stream.codec_context.extradata or b"")
    length_at = {"h264": 4, "hevc": 21}.get(codec)  # of lengthSizeMinusOne in avcC and hvcC
    length_size = (extradata[length_at] & 3) + 1 if length_at and len(extradata) > length_at and extradata[0] == 1 else 0
    packets, pts, entry, droppable, layers = [], [], [], [], []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        packets.append(packet)
        pts.append(packet.pts)
        if codec == "h264":
            # Other key frames exist (recovery points), but after one of those a picture may still refer to older ones.
            restarts, drop = h264_packet(bytes(packet), length_size)
        elif codec == "hevc":
            restarts, (layer, drop) = packet.is_keyframe, hevc_layer(bytes(packet), length_size)
            layers.append(layer)
        else:
            restarts, drop = packet.is_keyframe, False
        entry.append(restarts)
        droppable.append(drop)
    if layers:  # a sub-layer non-reference picture may still serve the layers above its own
        droppable = [drop and layer == max(layers) for drop, layer in zip(droppable, layers)]
    trusted = container.format.name != "avi" and None not in pts and len(set(pts)) == len(pts)
    return Packets(packets, pts, entry, droppable) if packets and trusted else None


def shown_at(times, seconds):
    """Which frame is on the screen: the last that began at or before each time. times (T,), seconds (n,) sorted -> (T,) numbers."""
    return np.clip(np.searchsorted(seconds, np.asarray(times) + SLACK, side="right") - 1, 0, len(seconds) - 1)


def wanted_frames(clips, seconds):
    """{frame number: {clip number: [places in the clip]}}. seconds (n,): when each frame is shown, counted from the first."""
    wanted = defaultdict(lambda: defaultdict(list))
    for number, clip in enumerate(clips):
        for place, frame in enumerate(shown_at(clip.times(seconds[-1]), seconds)):
            wanted[int(frame)][number].append(place)
    return wanted


def decode_needed(codec_context, table, wanted):
    """Decode only what the wanted time stamps need; yields frames, others among them.

    Per wanted frame: from the last packet before it at which decoding may begin and that is not shown later (a
    leading picture of an open group needs the group before), to its own packet. Droppable packets in between are
    left out, so the wanted frames come out bit for bit as from a decode of the whole file.
    """
    begin, runs = 0, []
    entries = [i for i, restarts in enumerate(table.entry) if restarts]
    for i, pts in enumerate(table.pts):
        if pts in wanted:
            begin = next((k for k in reversed(entries) if k <= i and table.pts[k] <= pts), 0)
            if runs and begin <= runs[-1][1] + 1:
                runs[-1][1] = i
                runs[-1][0] = min(begin, runs[-1][0])
            else:
                runs.append([begin, i])
    for first, last in runs:
        for i in range(first, last + 1):
            if table.pts[i] in wanted or not table.droppable[i]:
                yield from codec_context.decode(table.packets[i])
        yield from codec_context.decode(None)
        codec_context.flush_buffers()


class Renderer:
    """Crop, scale, flip and conversion to RGB in libavfilter: a decoded frame -> (H, W, 3) uint8. One per clip."""

    def __init__(self, clip, size, aspect):
        self.clip, self.size, self.aspect = clip, size, aspect  # aspect: width / height of a pixel
        self.box = self.seen = self.graph = None

    def build(self, frame):
        upright = frame.width * self.aspect, frame.height
        turned = frame.rotation % 360
        if turned in (90, 270):
            upright = upright[::-1]
        if self.box is None:  # as shares of the upright picture, so it outlives a change of resolution
            self.box, self.flip = self.clip.box(*upright)
        width, height = (frame.height, frame.width) if turned in (90, 270) else (frame.width, frame.height)
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
        plane = self.graph.vpull().planes[0]
        (H, W), rows = self.size, np.frombuffer(plane, np.uint8)
        out[:] = rows.reshape(H, plane.line_size)[:, :3 * W].reshape(H, W, 3)  # the one copy in Python


def read_clips(path, clips, size):
    """Several clips of one video from one decode: uint8 (len(clips), T, H, W, 3).

    A clip says when (`times(end)`, seconds of its T frames) and where (`box(width, height)`, the crop and the flip):
    see `RandomClip`. size: (H, W). Raises BadVideo with the reason when the file does not give them.
    """
    try:
        out = read_needed(path, clips, size)
        return read_plainly(path, clips, size) if out is None else out
    except (av.FFmpegError, OSError, UnicodeError) as error:
        raise BadVideo(f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}") from error


def new_renderers(stream, clips, size):
    aspect = float(stream.sample_aspect_ratio or 0) or 1.0
    return [Renderer(clip, size, aspect) for clip in clips], np.empty((len(clips), len(clips[0].times(0)), *size, 3), np.uint8)


def render(frame, places, renderers, out):
    for number, (first, *others) in places.items():
        renderers[number](frame, out[number, first])
        for place in others:  # the same frame again: a slow or a short video
            out[number, place] = out[number, first]


def read_needed(path, clips, size):
    """`read_clips` by time stamps, decoding only what is needed. None if this file does not allow it."""
    with open_video(path) as (container, stream):
        table = read_packets(container, stream)
        if table is None:
            return None
        shown = sorted(pts for pts, packet in zip(table.pts, table.packets) if not packet.is_discard)  # edit lists cut frames off
        if not shown:
            return None
        seconds = (np.array(shown) - shown[0]) * float(stream.time_base)  # (n,)
        wanted = {shown[frame]: places for frame, places in wanted_frames(clips, seconds).items()}
        renderers, out = new_renderers(stream, clips, size)
        try:
            for frame in decode_needed(stream.codec_context, table, wanted):
                if frame.pts in wanted and not frame.is_corrupt:
                    render(frame, wanted.pop(frame.pts), renderers, out)
        except av.FFmpegError:
            return None
    return None if wanted else out


def read_plainly(path, clips, size):
    """`read_clips` for any file: decode it all to learn when its frames are shown, then again to take the wanted ones."""
    with open_video(path) as (container, stream):
        pts = [frame.pts for frame in container.decode(stream)]
        if not pts:
            raise BadVideo("no frame could be decoded")
        if None in pts or any(b <= a for a, b in zip(pts, pts[1:])):  # no usable time stamps: frames are shown at an even rate
            seconds = np.arange(len(pts)) / float(stream.average_rate or stream.guessed_rate or 30)
        else:
            seconds = (np.array(pts) - pts[0]) * float(stream.time_base)
    wanted = wanted_frames(clips, seconds)
    with open_video(path) as (container, stream):
        renderers, out = new_renderers(stream, clips, size)
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                render(frame, wanted.pop(number), renderers, out)
            if not wanted:
                break
    if wanted:
        raise BadVideo("the file decodes differently each time")
    return out


class RandomClip:
    """A clip at a random time and place: T frames, `stride` thirtieths of a second apart, randomly cropped and flipped.

    area: range of the crop's share of the picture ([0.5, 1] for pre-training); aspect 3/4 to 4/3, as everywhere.
    """

    def __init__(self, rng, frames, stride, area=(0.5, 1.0), flip=True):
        self.start, self.flip = rng.random(), flip and rng.random() < 0.5
        self.rng, self.area = rng, area
        self.offsets = np.arange(frames) * stride / 30  # s

    def times(self, end):
        """(T,) seconds: frame i is the one on the screen at start + i * stride / 30 s. end: when the last frame comes up."""
        return self.start * max(0.0, end - self.offsets[-1]) + self.offsets

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
    """Paths, labels and class names. The paths are one block of bytes: as 300,000 strings, every worker would end up
    with a copy of them, because counting references writes to their pages."""

    def __init__(self, paths, labels=None, classes=None):
        encoded = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self.block = b"".join(encoded)
        self.labels = labels  # a string per video, or None
        self.classes = classes

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        return os.fsdecode(self.block[self.ends[i - 1] if i else 0:self.ends[i]])


def list_videos(data):
    """A folder (flat, or one sub-folder a class) or a list file -> VideoList. Raises InputError; prints what it left out."""
    path = Path(data)
    if path.is_dir():
        return videos_in_folder(path)
    if path.is_file():
        return videos_in_list(path)
    raise InputError(f"--data {data}: no such folder or list file")


def videos_in_folder(folder):
    paths, labels, ignored, visited = [], [], Counter(), set()
    for where, folders, files in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(where))
        folders[:] = sorted(name for name in folders if os.path.realpath(os.path.join(where, name)) not in visited)  # a link may lead back
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in VIDEO_SUFFIXES:
                inside = os.path.relpath(where, folder)
                paths.append(os.path.join(where, name))
                labels.append(None if inside == "." else inside.split(os.sep)[0])
            else:
                ignored[suffix or name] += 1
    if ignored:
        print(f"not videos by their suffix, left out: {', '.join(f'{count} x {suffix}' for suffix, count in ignored.most_common(5))}")
    if not paths:
        raise InputError(f"--data {folder}: no video in this folder or below; looked for {' '.join(sorted(VIDEO_SUFFIXES))}")
    return VideoList(paths, labels if None not in labels else None)


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
        lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise InputError(f"--data {file}: {error.strerror}") from error
    if "\0" in "".join(lines[:100]):
        raise InputError(f"--data {file}: this is not a text file; give a folder of videos or a list with one path a line")
    entries = [parse_line(line) for line in lines if line.strip()]
    if not entries:
        raise InputError(f"--data {file}: the list is empty; give one path a line")
    labels = [label for _, label in entries]
    if None in labels and any(labels):
        row = labels.index(None)
        raise InputError(f"--data {file}: {entries[row][0]!r} has no label and others have; label all lines or none")
    folder = os.path.abspath(file.parent)
    return VideoList([os.path.join(folder, path) for path, _ in entries], None if None in labels else labels)


def random(*numbers):
    """A generator that depends on these numbers and nothing else. The second one keeps uses apart (below)."""
    return np.random.default_rng(numbers)


ORDER, CLIP, REPLACEMENT = range(3)


class VideoClips(Dataset):
    """clips[k]: the k-th sample of training, all its repeats from one decode, and the noise that will mask them.

    Everything random comes from (seed, k, repeat): not from the worker, the rank or the clock. Sample k is video
    perm(seed, k // n)[k % n] of n; a video that cannot be read is replaced by one that k alone determines.
    """

    def __init__(self, videos, *, seed, repeat, frames, stride, size, noise=None, area=(0.5, 1.0), flip=True):
        self.videos, self.seed, self.repeat = videos, seed, repeat
        self.frames, self.stride, self.size, self.area, self.flip = frames, stride, size, area, flip
        self.noise = noise  # (strategy, grid), or None for no noise
        self.order = (None, None)  # the pass we are in, and its permutation

    def video_of(self, k):
        turn, place = divmod(k, len(self.videos))
        if self.order[0] != turn:
            self.order = turn, random(self.seed, ORDER, turn).permutation(len(self.videos))
        return int(self.order[1][place])

    def __getitem__(self, k):
        video, bad = self.video_of(k), []
        for attempt in range(10):
            generators = [random(self.seed, CLIP, k, repeat) for repeat in range(self.repeat)]
            clips = [RandomClip(rng, self.frames, self.stride, self.area, self.flip) for rng in generators]
            try:
                pixels = read_clips(self.videos[video], clips, self.size)  # (R, T, H, W, 3)
                break
            except BadVideo as reason:
                bad.append((video, str(reason)))
                video = int(random(self.seed, REPLACEMENT, k, attempt).integers(len(self.videos)))
        else:
            pixels, video = np.zeros((self.repeat, self.frames, *self.size, 3), np.uint8), -1
        item = dict(video=torch.from_numpy(pixels), index=video, bad=bad)
        if self.noise:
            strategy, grid = self.noise
            seeds = [torch.Generator().manual_seed(int(random(self.seed, CLIP, k, repeat, 1).integers(2**62))) for repeat in range(self.repeat)]
            item["noise"] = torch.cat([mask_noise(strategy, 1, grid, generator) for generator in seeds])  # (R, a, b, c)
        return item


class StepSampler:
    """Sample numbers for one rank, in order. Step s takes samples s * G to (s + 1) * G, G = batch_size * accum * world;
    its micro-batch a on rank r takes the slice a * world + r."""

    def __init__(self, steps, batch_size, accum, rank, world):
        self.steps, self.batch_size, self.accum, self.rank, self.world = steps, batch_size, accum, rank, world

    def __iter__(self):
        for step in self.steps:
            for micro in range(self.accum):
                yield list(self.samples(step, micro))

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
