"""From a video file to Qwen-VL's inputs: frames and their times, patches, and position ids.

The path of one clip:
    read_clip   file -> F frames and the seconds between them (decoded by PyAV, i.e. FFmpeg)
    resize      F frames -> F frames whose sides are multiples of 28, within a pixel budget
    patchify    F frames -> S patches of 14 x 14 pixels x 2 frames, and their grid (t, h, w)
    mrope_positions   token ids + grid + seconds -> positions on three axes (time, height, width)

Shape letters: F frames (even), H and W pixels, S patches = t h w, P prompt tokens. A video *token*
is merge x merge patches (2 x 2), so a clip has t h w / 4 tokens.

Source of the sampling and resizing rules: the official code at aa529ff,
qwen-vl-utils/src/qwen_vl_utils/ vision_process.py; of the patches: transformers'
Qwen2VLImageProcessor; of the positions: see `mrope_positions`. Equations: docs/equations.md.
"""

import bisect
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from files import UserError, brief

MIN_FRAMES = 4
MAX_ASPECT = 200
MAX_FRAME_PIXELS = 4096 * 4096  # before resizing; 16 such frames take 0.8 GB
# FFmpeg's names of the formats that hold clips. Not playlists: FFmpeg would open any file or URL
# that a playlist names.
FORMATS = "mov mp4 m4a 3gp 3g2 mj2 matroska webm avi gif mpegts mpeg flv ogg asf".split()
# Per channel (red, green, blue in 0..1), for Qwen2-VL's and Qwen2.5-VL's vision towers.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


class VideoError(UserError):
    """A clip cannot be used; the message says why. `read_clip` adds the file name."""


@dataclass(frozen=True)
class ClipSettings:
    """How many frames of a clip are shown, and how large. The defaults are the official ones."""

    fps: float = 2.0  # frames sampled per second of video
    max_frames: int = 16
    min_pixels: int = 128 * 28 * 28  # per frame, after resizing
    max_pixels: int = 196 * 28 * 28


DEFAULTS = ClipSettings()


@dataclass
class Clip:
    frames: Tensor  # (F, 3, H, W) uint8
    seconds: float  # between consecutive frames, on average
    times: list[float] | None = None  # seconds at which each frame is shown; None: evenly spaced


@dataclass(frozen=True)
class Geometry:
    """How a model splits a video into tokens; read from its config."""

    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # frames
    merge_size: int = 2  # patches per side of a token
    # On the time axis; None: one position per temporal patch (Qwen2-VL).
    tokens_per_second: float | None = 2.0
    # Qwen3-VL: each temporal patch is its own block, preceded by its time as text.
    timestamps: bool = False
    mean: tuple[float, float, float] = IMAGE_MEAN  # of red, green, blue in 0..1
    std: tuple[float, float, float] = IMAGE_STD

    @property
    def factor(self) -> int:
        return self.patch_size * self.merge_size


def frame_indices(total: int, rate: float, settings: ClipSettings = DEFAULTS) -> list[int]:
    """Eq. 27: which of `total` frames at `rate` per second to show: an even number, evenly spaced,
    about `fps` per second.

    At least 4 (or all) and at most `max_frames`, always including the first and last frame.
    """
    count = min(max(total / rate * settings.fps, MIN_FRAMES), settings.max_frames, total)
    count = int(count // 2) * 2
    if count < 2:
        raise VideoError(f"has {total} frame(s); at least 2 are needed")
    return torch.linspace(0, total - 1, count).round().long().tolist()


def read_clip(path: str | os.PathLike, settings: ClipSettings = DEFAULTS) -> Clip:
    """Samples frames from a video file, upright, with the seconds between them. Raises VideoError
    naming the file and the reason.

    OFFICIAL: the time between frames is dropped, and the model is told 1 second per temporal patch
    for every video.
    OURS: the true spacing is kept with the frames, which is what Qwen2.5-VL was trained on.
    """
    path = check_file(path)
    try:
        with _open(path) as container:
            stream = container.streams.video[0]
            # Headers often lie about the number of frames, so count the packets.
            packets = (p for p in container.demux(stream) if p.size and not p.is_discard)
            packets = [(p.pts, p.is_keyframe) for p in packets]  # drop their data
            rate, unit = float(stream.average_rate or 0), float(stream.time_base)
            can_jump = container.format.name.startswith(("mov", "matroska"))  # both have an index
        packets.sort(key=lambda packet: (packet[0] is not None, packet[0]))  # in display order
        pts = [time for time, _ in packets]
        indices, seconds, times = choose_frames(np.array(pts, float) * unit, rate, settings)
        keyframes = [k for k, (_, is_keyframe) in enumerate(packets) if is_keyframe and can_jump]
        return Clip(_decode(path, indices, pts, keyframes), seconds, times)
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from None
    except Exception as error:  # PyAV raises many types of its own for unreadable files
        raise VideoError(f"{path}: cannot be decoded ({brief(error)})") from error


def check_file(path: str | os.PathLike) -> str:
    """The path as a string. Raises VideoError if the file is missing or empty."""
    path = os.fspath(path)
    if not os.path.isfile(path) or not os.path.getsize(path):
        raise VideoError(f"{path}: no such video file, or an empty one")
    return path


def repeat_frames(clip: Clip, count: int) -> Clip:
    """Exactly `count` frames, taken evenly from the sampled ones, so with repeats or gaps; the
    seconds between frames are the average of the new spacing.

    The official evaluators show 16 this way: the variables meant to set the number of frames are
    set after the reader has already read them.
    """
    sampled = len(clip.frames)
    indices = torch.linspace(0, sampled - 1, count).long()
    times = clip.times and [clip.times[k] for k in indices]
    return Clip(clip.frames[indices], clip.seconds * (sampled - 1) / (count - 1), times)


def choose_frames(
    times: np.ndarray, rate: float, settings: ClipSettings
) -> tuple[list[int], float, list[float]]:
    """Which frames to show, the seconds between them, and when each is shown, given the time of
    every frame in seconds.

    Uses the header's frame rate unless some frame is more than one frame away from where that rate
    puts it: then the rate varies or the header is wrong. In that case, it takes the frames on
    screen at evenly spaced times, so one that stays long is shown more than once. Containers
    without times (NaN) leave only the header.
    """
    total, elapsed = len(times), times - times[:1]
    increasing = total > 1 and np.isfinite(times).all() and (np.diff(times) > 0).all()
    if rate > 0 and not (increasing and abs(elapsed - np.arange(total) / rate).max() > 1 / rate):
        indices = frame_indices(total, rate, settings)
        seconds = (indices[-1] - indices[0]) / (len(indices) - 1) / rate
        return indices, seconds, [k / rate for k in indices]
    if not increasing:
        raise VideoError("has neither a frame rate nor frame times")
    count = len(frame_indices(total, (total - 1) / elapsed[-1], settings))
    shown = np.linspace(0, elapsed[-1], count)
    indices = (np.searchsorted(elapsed, shown, "right") - 1).tolist()
    return indices, elapsed[-1] / (count - 1), shown.tolist()


def _open(path: str):
    """Opens the file as an av container with a usable video stream."""
    import av

    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(FORMATS)}
    # An absolute path: FFmpeg would take "concat:a.mp4" as a command, but not "/x/concat:a.mp4".
    container = av.open(os.path.abspath(path), options=options)
    if not container.streams.video:
        raise VideoError("the file has no video stream")
    codec = container.streams.video[0].codec_context
    size = f"its frames have {codec.width} x {codec.height} pixels"
    if codec.width * codec.height > MAX_FRAME_PIXELS:
        raise VideoError(f"{size}; at most {MAX_FRAME_PIXELS:,} are decoded")
    if max(codec.width, codec.height) > MAX_ASPECT * min(codec.width, codec.height):
        raise VideoError(f"{size}, more than {MAX_ASPECT} to 1")
    codec.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # if the header lies about it
    codec.thread_count = 1  # many small clips: starting threads takes longer than decoding
    return container


def _decode(path: str, indices: list[int], pts: list[int | None], keyframes: list[int]) -> Tensor:
    """Decodes the frames `indices`, which ascend: (F, 3, H, W) uint8. `pts` are the times of all
    frames in the container's units, `keyframes` the indices of those we can seek to."""
    from av.video.reformatter import VideoReformatter

    # After a seek, a frame is identified by its time; without seeks, frames are counted.
    numbers = {t: k for k, t in enumerate(pts)} if keyframes else {}
    with _open(path) as container:
        stream, convert = container.streams.video[0], VideoReformatter()
        size, frames = (stream.width, stream.height), container.decode(stream)
        shown, number = [], -1
        for k in indices:
            start = bisect.bisect(keyframes, k) - 1
            if start >= 0 and keyframes[start] > number + 1:
                number = keyframes[start] - 1
                container.seek(pts[number + 1], stream=stream)
                frames = container.decode(stream)
            while number < k:
                frame = next(frames, None)
                if frame is None:
                    raise VideoError(f"is truncated: it ends before frame {k} of {len(pts)}")
                number = numbers.get(frame.pts, number + 1)
            if number > k:  # a seek overshot, or a frame's time differs from its packet's
                return _decode(path, indices, pts, [])
            picture = convert.reformat(frame, *size, format="rgb24").to_ndarray()
            shown.append(torch.rot90(torch.from_numpy(picture), round(frame.rotation / 90)))
        return torch.stack(shown).permute(0, 3, 1, 2)


def resized_shape(
    height: int, width: int, settings: ClipSettings = DEFAULTS, factor: int = 28
) -> tuple[int, int]:
    """Eq. 28: (height, width) in multiples of `factor` with about the same aspect ratio, covering
    min_pixels to max_pixels unless the aspect ratio is too extreme for that."""
    min_pixels, max_pixels = settings.min_pixels, settings.max_pixels
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return h, w


def resize(frames_F3HW: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, rounded to integers: (F, 3, height, width) float32 in 0..255."""
    frames = F.interpolate(frames_F3HW.float(), (height, width), mode="bicubic", antialias=True)
    return frames.round().clamp(0, 255)


def load_clip(path: str | os.PathLike, settings: ClipSettings = DEFAULTS, factor: int = 28) -> Clip:
    """Sampled and resized frames of a file, as uint8: what a worker process sends back."""
    clip = read_clip(path, settings)
    shape = resized_shape(*clip.frames.shape[-2:], settings, factor)
    # One frame at a time, because whole clips in float32 take gigabytes.
    frames = [resize(frame_3HW[None], *shape).to(torch.uint8) for frame_3HW in clip.frames]
    return Clip(torch.cat(frames), clip.seconds, clip.times)


def patchify(frames_F3HW: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames in 0..255 to normalised patches: ((S, 3 * 2 * 14 * 14) float32, grid (t, h, w) in
    patches).

    Rows are ordered by time, then by token in reading order, then by patch within its 2 x 2 token;
    columns by colour, frame, height, width.
    """
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (geometry.mean, geometry.std))
    pixels = (frames_F3HW.float() / 255 - mean) / std
    p, q, m = geometry.patch_size, geometry.temporal_patch_size, geometry.merge_size
    t, h, w = pixels.shape[0] // q, pixels.shape[2] // p, pixels.shape[3] // p
    #                        0  1  2  3       4  5  6       7  8
    pixels = pixels.reshape(t, q, 3, h // m, m, p, w // m, m, p)
    pixels = pixels.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # (t, h/m, w/m, m, m, 3, q, p, p)
    return pixels.reshape(t * h * w, 3 * q * p * p), (t, h, w)


def mrope_positions(
    ids_P: Tensor,
    video_token_id: int,
    grid: tuple[int, int, int],
    seconds_per_patch: float,
    geometry: Geometry,
) -> Tensor:
    """Eq. 29: position ids of a prompt with one video, for multimodal rotary embedding: (3, P)
    int64, axes time, height, width.

    Text advances by one on all three axes. The video token at temporal patch k, row y, column x is
    at s + (floor(k * seconds_per_patch * tokens_per_second), y, x), where s is the position of the
    video's first token; for Qwen2-VL, which has no absolute time, at s + (k, y, x). Text after the
    video resumes at the largest position so far on any axis plus 1. For Qwen3-VL each temporal
    patch is its own block, with text between the blocks, and k is 0 in each.

    This is the rule of the models' authors and of transformers 4.50, with which the published
    checkpoint was trained. Later versions changed it: intervals below 1 s collapsed, and since 5.3
    the text after a video starts at the *spatial* extent and so overlaps the video's own time axis.
    That is why these positions are always passed explicitly.

    Raises ValueError if the video tokens are not one block of exactly t * h * w / merge^2, or t
    blocks of h * w / merge^2.
    """
    t, h, w = grid[0], grid[1] // geometry.merge_size, grid[2] // geometry.merge_size
    blocks, t = (t, 1) if geometry.timestamps else (1, t)
    is_video, lengths = (ids_P == video_token_id).unique_consecutive(return_counts=True)
    if lengths[is_video].tolist() != [t * h * w] * blocks:
        raise ValueError(
            f"the prompt has blocks of {lengths[is_video].tolist()} video tokens where {blocks} of "
            f"{t} x {h} x {w} are expected"
        )
    rate = geometry.tokens_per_second
    step = 1.0 if rate is None else seconds_per_patch * rate
    time = torch.tensor([math.floor(k * step) for k in range(t)])
    axes = torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")
    block = torch.stack([axis.flatten() for axis in axes])  # (3, t * h * w)
    parts, start = [], 0
    for in_video, length in zip(is_video.tolist(), lengths.tolist(), strict=True):
        part = block if in_video else torch.arange(length).expand(3, -1)
        parts.append(part + start)
        start = int(parts[-1].max()) + 1
    return torch.cat(parts, dim=1)
