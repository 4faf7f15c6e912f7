"""From a video file to what Qwen2-VL and Qwen2.5-VL read: frames and their times, patches, and
position ids.

The path of one clip:
    read_clip   file -> F frames and the seconds between them (by decord, or PyAV without it)
    resize      F frames -> F frames whose sides are multiples of 28 within a pixel budget
    patchify    F frames -> S patches of 14 x 14 pixels x 2 frames, and their grid (t, h, w)
    mrope_positions   token ids + grid + seconds -> positions on three axes (time, height, width)

Letters in shapes: F frames (even), H and W pixels, S patches = t h w, P prompt tokens. A video
*token* is merge x merge patches (2 x 2), so a clip has t h w / 4 tokens.

Source of the sampling and resizing rules: the official code at aa529ff,
qwen-vl-utils/src/qwen_vl_utils/ vision_process.py; of the patches: transformers'
Qwen2VLImageProcessor; of the positions: see `mrope_positions`. Equations: docs/equations.md.
"""

import importlib.util
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FPS = 2.0  # frames sampled per second of video
MIN_FRAMES, MAX_FRAMES = 4, 16
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 196 * 28 * 28  # per frame, after resizing
MAX_ASPECT = 200
CLIP_MEAN = (
    0.48145466,
    0.4578275,
    0.40821073,
)  # of the image statistics both vision towers were trained with
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class VideoError(Exception):
    """A clip that cannot be used. The message names the file and says why."""


class TooShort(ValueError):
    """Fewer frames than one temporal patch."""


@dataclass
class Clip:
    frames: Tensor  # (F, 3, H, W) uint8
    seconds: float  # between one frame and the next


@dataclass(frozen=True)
class Geometry:
    """How a model cuts a video into tokens; read from its config."""

    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # frames
    merge_size: int = 2  # patches a side of one token
    tokens_per_second: float | None = (
        2.0  # of the time axis; None: one position per temporal patch (Qwen2-VL)
    )

    @property
    def factor(self) -> int:
        return self.patch_size * self.merge_size


def frame_indices(
    total: int, rate: float, fps: float = FPS, max_frames: int = MAX_FRAMES
) -> list[int]:
    """Eq. 27: which of `total` frames, shot at `rate` a second, to show: about `fps` a second,
    evenly spaced, an even number.

    At least 4 (or all there are) and at most `max_frames`; first and last frame always included.
    """
    count = min(max(total / rate * fps, MIN_FRAMES), max_frames, total)
    count = int(count // 2) * 2
    if count < 2:
        raise TooShort(f"has {total} frame(s); at least 2 are needed")
    return torch.linspace(0, total - 1, count).round().long().tolist()


def read_clip(path: str | os.PathLike, fps: float = FPS, max_frames: int = MAX_FRAMES) -> Clip:
    """Sampled frames of a video file and the seconds between them. Raises VideoError naming the
    file and the reason.

    OFFICIAL: the time between frames is dropped, and the model is told 1 second per temporal patch
    for every video.
    OURS: the true spacing travels with the frames, which is what Qwen2.5-VL was trained to expect.
    """
    path = check_file(path)
    decode = _decode_decord if importlib.util.find_spec("decord") else _decode_av
    try:
        frames, indices, rate = decode(path, fps, max_frames)
    except VideoError:
        raise
    except TooShort as error:
        raise VideoError(f"{path}: {error}") from None
    except Exception as error:  # decord and PyAV have many types of their own for unreadable files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise VideoError(f"{path}: cannot be decoded ({reason[0][:200]})") from error
    return Clip(frames, (indices[-1] - indices[0]) / (len(indices) - 1) / rate)


def check_file(path: str | os.PathLike) -> str:
    """The path as a string. Raises VideoError if it is no file that could hold a clip."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such video file")
    if not os.path.isfile(path):
        raise VideoError(f"{path}: not a regular file")
    if os.path.getsize(path) == 0:
        raise VideoError(f"{path}: the file is empty")
    return path


def repeat_frames(clip: Clip, count: int) -> Clip:
    """Exactly `count` frames, evenly taken from those sampled, hence with repeats or gaps.

    The official evaluators show 16 this way, because they set their variables after the reader has
    read them. The seconds between frames become those of the new spacing, on average.
    """
    sampled = len(clip.frames)
    indices = torch.linspace(0, sampled - 1, count).long()
    return Clip(clip.frames[indices], clip.seconds * (sampled - 1) / (count - 1))


def _decode_decord(path: str, fps: float, max_frames: int) -> tuple[Tensor, list[int], float]:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    rate = _checked_rate(path, reader.get_avg_fps())
    indices = frame_indices(len(reader), rate, fps, max_frames)
    frames = torch.from_numpy(reader.get_batch(indices).asnumpy())
    return frames.permute(0, 3, 1, 2), indices, rate


def _decode_av(path: str, fps: float, max_frames: int) -> tuple[Tensor, list[int], float]:
    import av

    with av.open(
        path
    ) as container:  # headers often lie about the number of frames, so count the packets
        if not container.streams.video:
            raise VideoError(f"{path}: the file has no video stream")
        rate = _checked_rate(path, float(container.streams.video[0].average_rate or 0))
        total = sum(packet.size > 0 for packet in container.demux(video=0))
    indices = frame_indices(total, rate, fps, max_frames)
    wanted, frames = set(indices), []
    with av.open(path) as container:
        for k, frame in enumerate(container.decode(video=0)):
            if k in wanted:
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if k == indices[-1]:
                break
    if len(frames) < len(indices):
        raise VideoError(
            f"{path}: ends before frame {indices[-1]} of the {total} it announces; it is cut short"
        )
    return torch.stack(frames).permute(0, 3, 1, 2), indices, rate


def _checked_rate(path: str, rate: float) -> float:
    if not (math.isfinite(rate) and rate > 0):
        raise VideoError(f"{path}: has no frame rate, so the time between its frames is unknown")
    return rate


def resized_shape(
    height: int,
    width: int,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    factor: int = 28,
) -> tuple[int, int]:
    """Eq. 28: (height, width) in multiples of `factor`, about the same aspect, holding min_pixels
    to max_pixels unless the sides are too unequal for that."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"is {width} x {height} pixels; more than {MAX_ASPECT} times longer than wide"
        )
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return h, w


def resize(frames_F3HW: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, in whole pixel values: (F, 3, height, width) float32 in 0..255."""
    frames = frames_F3HW.float()
    if frames.shape[-2:] == (height, width):
        return frames
    frames = F.interpolate(
        frames, (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return frames.round().clamp(0, 255)


def load_clip(
    path: str | os.PathLike,
    fps: float = FPS,
    max_frames: int = MAX_FRAMES,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    factor: int = 28,
) -> Clip:
    """Sampled and resized frames of a file, still uint8: what a worker process sends back."""
    clip = read_clip(path, fps, max_frames)
    try:
        shape = resized_shape(*clip.frames.shape[-2:], min_pixels, max_pixels, factor)
    except ValueError as error:
        raise VideoError(f"{path}: {error}") from None
    return Clip(resize(clip.frames, *shape).to(torch.uint8), clip.seconds)


def patchify(frames_F3HW: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames in 0..255 to normalised patches: ((S, 3 * 2 * 14 * 14) float32, grid (t, h, w) in
    patches).

    The rows run over time, then over tokens in reading order, then over the 2 x 2 patches of a
    token; within a row over colour, frame, height, width.
    """
    frames_F3HW = frames_F3HW.float()
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    pixels = (frames_F3HW / 255 - mean) / std
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

    Text counts up by one on all three axes at once. The token of the video at temporal patch k, row
    y, column x stands at s + (floor(k * seconds_per_patch * tokens_per_second), y, x), where s is
    the position of its first token; for Qwen2-VL, which has no absolute time, at s + (k, y, x). The
    text after the video goes on at the largest position so far plus 1, on any axis.

    This is the rule of the models' authors and of transformers 4.50, with which the published
    checkpoint was trained. Later transformers changed it: intervals below 1 s collapsed, and from
    5.3 on the text after a video starts at the *spatial* extent and so overlaps the video's own
    time axis. Hence these positions are always passed explicitly.

    Raises ValueError if the video tokens are not one block of exactly t * h * w / merge^2.
    """
    t, h, w = grid[0], grid[1] // geometry.merge_size, grid[2] // geometry.merge_size
    is_video = ids_P == video_token_id
    start, count = int(is_video.int().argmax()), int(is_video.sum())
    if count != t * h * w or not is_video[start : start + count].all():
        raise ValueError(
            f"the prompt has {count} video tokens where one block of {t} x {h} x {w} is due"
        )

    step = (
        1.0
        if geometry.tokens_per_second is None
        else seconds_per_patch * geometry.tokens_per_second
    )
    time = torch.tensor([math.floor(k * step) for k in range(t)])
    axes = torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")
    video = torch.stack([axis.flatten() for axis in axes]) + start  # (3, count)
    before = torch.arange(start).expand(3, -1)
    after = torch.arange(len(ids_P) - start - count).expand(3, -1) + video.max() + 1
    return torch.cat([before, video, after], dim=1)
