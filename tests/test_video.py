"""Frames, patches and position ids against transformers and against files no one here wrote."""

import itertools
import os
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import PROJECT

import video
from video import Geometry, VideoError, frame_indices, mrope_positions, read_clip, resized_shape

# Position ids of Qwen2.5-VL as transformers 4.50.0 computes them, the version of the official
# recipe, for text, <vision_start>, t x h x w video tokens, <vision_end>, text: (grid in patches,
# seconds per temporal patch, text before, text after) -> first position of each temporal patch, and
# position of <vision_end>. Qwen2-VL ignores the seconds, here None.
TRANSFORMERS_4_50 = [
    ((5, 4, 6), 1.0, 3, 4, [4, 6, 8, 10, 12], 13),
    ((5, 4, 6), 0.5, 3, 4, [4, 5, 6, 7, 8], 9),
    ((4, 2, 2), 0.6, 0, 0, [1, 2, 3, 4], 5),  # 0, 1.2, 2.4 and 3.6, rounded down, stay apart
    ((8, 8, 6), 7.5, 1, 2, [2, 17, 32, 47, 62, 77, 92, 107], 108),
    ((3, 4, 4), None, 2, 1, [3, 4, 5], 6),
]
VIDEO_ID = 9


@pytest.mark.parametrize("grid, seconds, before, after, time, end", TRANSFORMERS_4_50)
def test_positions_equal_transformers_4_50(grid, seconds, before, after, time, end):
    tokens = grid[0] * grid[1] * grid[2] // 4
    ids_P = torch.tensor([5] * before + [1] + [VIDEO_ID] * tokens + [2] + [5] * after)
    geometry = Geometry(tokens_per_second=seconds and 2.0)
    positions = mrope_positions(ids_P, VIDEO_ID, grid, seconds or 7.5, geometry)
    h, w, start = grid[1] // 2, grid[2] // 2, before + 1
    shown = itertools.product(time, range(start, start + h), range(start, start + w))
    text_before, text_after = torch.arange(start), torch.arange(end, end + after + 1)
    expected = [text_before.expand(3, -1), torch.tensor(list(shown)).T, text_after.expand(3, -1)]
    assert torch.equal(positions, torch.cat(expected, dim=1))


@pytest.mark.parametrize("ids", [[5, 9, 9, 9, 5], [9, 9, 5, 9, 9], [5, 5]])
def test_positions_refuse_video_tokens_that_do_not_fit_the_grid(ids):
    with pytest.raises(ValueError, match="video tokens"):
        mrope_positions(torch.tensor(ids), VIDEO_ID, (1, 4, 4), 1.0, Geometry())


@pytest.mark.parametrize(
    "total, rate, indices",
    [
        (128, 25.0, [0, 14, 28, 42, 56, 71, 85, 99, 113, 127]),  # a CLEVRER clip
        (90000, 25.0, [round(5999.933333333333 * k) for k in range(16)]),
        (8, 4.0, [0, 2, 5, 7]),
        (5, 5.0, [0, 1, 3, 4]),
        (3, 30.0, [0, 2]),
        (2, 1.0, [0, 1]),
    ],
)
def test_frame_indices_by_number(total, rate, indices):
    """round(linspace(0, total - 1, count)), count the even number at or below 2 * seconds, from 4
    to 16 and no more than there are."""
    assert frame_indices(total, rate) == indices


def test_resized_shape_keeps_the_pixel_budget():
    assert resized_shape(320, 480) == (308, 476)
    assert resized_shape(360, 640) == resized_shape(1080, 1920) == (280, 504)
    assert resized_shape(56, 56) == (336, 336) and resized_shape(28, 2800) == (56, 3192)
    # OFFICIAL: 28 / 1.01 rounded down to a multiple of 28 is 0.  OURS: at least 28.
    assert resized_shape(28, 5600) == (28, 5516)


def write_clip(path, frames_FHW3, codec="libx264", rate=30, seconds=(), options=None, turned=None):
    """A clip of any kind; `seconds` are the frames' own times, to the millisecond."""
    av, millisecond = pytest.importorskip("av"), Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames_FHW3.shape[1:3]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if seconds:
            stream.codec_context.time_base = millisecond
        if turned:
            stream.set_display_rotation(turned)
        for k, picture in enumerate(frames_FHW3):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt)
            if seconds:
                frame.pts, frame.time_base = round(seconds[k] * 1000), millisecond
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def grey_steps(count, height=48, width=64):
    """Frame k is a plain grey of 8 k, so that each can be told by its brightness."""
    return np.stack([np.full((height, width, 3), 8 * k % 256, np.uint8) for k in range(count)])


def shown_steps(clip):
    return [round(frame.float().mean().item() / 8) for frame in clip.frames]


def test_jumping_to_keyframes_gives_the_frames_of_decoding_all_of_them(tmp_path):
    """Open groups of pictures, whose B-frames refer across keyframes."""
    av = pytest.importorskip("av")
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    frames = np.stack([np.roll(picture, 3 * k, 1) for k in range(240)])
    options = {"g": "24", "x264-params": "open-gop=1:bframes=3:log-level=none"}
    path = write_clip(tmp_path / "clip.mp4", frames, options=options)
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    indices = frame_indices(240, 30)
    assert len(every) == 240 and len(indices) == 16
    expected = torch.from_numpy(np.stack([every[k] for k in indices])).permute(0, 3, 1, 2)
    assert torch.equal(read_clip(path).frames, expected)


CODECS = "webm libvpx-vp9, avi mpeg4, gif gif, mpg mpeg2video, wmv wmv2"
CODECS += ", avi libx264, mkv libx264, ts libx264, flv libx264, mov libx264"


@pytest.mark.parametrize("kind", CODECS.split(", "))
def test_containers_of_the_benchmarks_are_read(kind, tmp_path):
    suffix, codec = kind.split()
    rate = 10 if codec == "gif" else 25
    clip = read_clip(write_clip(tmp_path / f"a.{suffix}", grey_steps(30), codec, rate))
    assert clip.seconds == pytest.approx(29 / (len(clip.frames) - 1) / rate)
    expected = frame_indices(30, rate)
    assert all(abs(k - e) <= 1 for k, e in zip(shown_steps(clip), expected, strict=True))


def test_frames_of_a_rotated_clip_are_upright(tmp_path):
    """Red above black, stored as it is and told to be turned: as players show it."""
    frames = np.zeros((8, 48, 64, 3), np.uint8)
    frames[:, :24, :, 0] = 200
    for turned, red in ((90, "left"), (-90, "right"), (180, "bottom")):  # counterclockwise
        clip = read_clip(write_clip(tmp_path / f"{red}.mp4", frames, rate=4, turned=turned))
        picture_HW = clip.frames[0, 0].float()
        assert picture_HW.shape == ((48, 64) if turned == 180 else (64, 48))
        halves = dict(left=picture_HW[:, :24], right=picture_HW[:, -24:], bottom=picture_HW[-24:])
        assert halves[red].mean() > 190 and picture_HW.mean() < 110


@pytest.mark.parametrize(
    "rate, times, fps, spacing, shown",
    [
        # The header says 1,000 a second; the frames are 1/30 s apart.
        (1000, [k / 30 for k in range(30)], 2.0, 29 / 30 / 3, [0, 9, 19, 29]),
        # Frame 9 stays for 4 seconds: it is on screen at 1, 2, 3 and 4 s.
        (30, [k / 30 for k in [*range(10), *range(141, 151)]], 1.3, 1.0, [0, 9, 9, 9, 9, 19]),
    ],
)
def test_where_the_header_is_wrong_frames_are_evenly_spaced_in_time(
    rate, times, fps, spacing, shown, tmp_path
):
    path = write_clip(tmp_path / "a.mkv", grey_steps(len(times)), rate=rate, seconds=times)
    clip = read_clip(path, video.ClipSettings(fps=fps))
    assert clip.seconds == pytest.approx(spacing, abs=1e-3) and shown_steps(clip) == shown


def test_no_setting_of_a_clip_comes_from_the_environment():
    # OFFICIAL: set in the environment after the reader has read it.  OURS: arguments only.
    for name in ("video.py", "data.py", "run/decoder.py"):
        assert not re.search("environ|getenv", (PROJECT / name).read_text(encoding="utf-8")), name


def test_huge_and_very_wide_frames_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", grey_steps(4))
    for name, most, reason in (
        ("MAX_ASPECT", 1.2, ", more than 1.2 to 1"),
        ("MAX_FRAME_PIXELS", 64 * 48 - 1, "; at most 3,071 are decoded"),
    ):
        monkeypatch.setattr(video, name, most)
        with pytest.raises(VideoError, match=f"a.mp4: its frames have 64 x 48 pixels{reason}"):
            read_clip(path)


def test_a_name_that_looks_like_an_address_is_only_a_name(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4|b.mp4", "http:a.mp4", "file:a.mp4", "data:a.mp4"):
        shutil.copy(world / "clips/train_000.mp4", name)
        assert len(read_clip(name).frames) == 4


def test_patches_equal_transformers_image_processor():
    """A still clip is one picture twice: transformers' PIL processor makes the same patches."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (308, 476, 3), dtype=np.uint8)
    limits = dict(min_pixels=4 * 784, max_pixels=16384 * 784)
    theirs = Qwen2VLImageProcessorPil()(picture, return_tensors="pt", **limits)
    still = torch.from_numpy(picture).permute(2, 0, 1).expand(2, -1, -1, -1)
    patches, grid = video.patchify(still, Geometry())
    assert [list(grid)] == theirs["image_grid_thw"].tolist()
    assert (patches - theirs["pixel_values"]).abs().max() < 1e-5


def test_resize_is_bicubic_with_antialiasing():
    """Against Pillow, which rounds between its two passes: equal but for that rounding."""
    from PIL import Image

    # not over the whole range, because Pillow also clips between its passes
    picture = np.random.default_rng(0).integers(90, 166, (100, 140, 3), dtype=np.uint8)
    pillow = Image.fromarray(picture).resize((84, 56), Image.Resampling.BICUBIC)
    ours = video.resize(torch.from_numpy(picture).permute(2, 0, 1)[None], 56, 84)[0]
    assert np.abs(ours.permute(1, 2, 0).numpy() - np.asarray(pillow, np.float32)).max() <= 1.0


def test_what_is_no_clip_is_named(world, tmp_path):
    (tmp_path / "directory.mp4").mkdir()
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "torn.mp4").write_bytes((world / "clips/train_000.mp4").read_bytes()[:-1000])
    write_clip(tmp_path / "short.mp4", grey_steps(1))
    reasons = dict.fromkeys(("missing", "directory", "fifo", "empty"), "no such video file")
    reasons |= dict(torn="cannot be decoded", short="has 1 frame.s.; at least 2 are needed")
    for name, reason in reasons.items():
        with pytest.raises(VideoError, match=f"{name}.mp4: {reason}"):
            read_clip(tmp_path / f"{name}.mp4")


TEXTS = {  # all but the first make FFmpeg open other files, or addresses
    "words": "not a video, but long enough to be one" * 100,
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clip}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{clip}'\n",
    "dash": '<?xml version="1.0"?><MPD profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
    "<BaseURL>{clip}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_and_playlists_that_pose_as_clips_are_refused(kind, world, tmp_path):
    shutil.copy(world / "clips/train_000.mp4", tmp_path / "clip.mp4")
    path = tmp_path / "posed.mp4"
    path.write_text(TEXTS[kind].format(clip="clip.mp4"))
    with pytest.raises(VideoError, match="posed.mp4: cannot be decoded") as error:
        read_clip(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(path))


def test_repeated_frames_by_hand():
    """10 frames as 16: linspace(0, 9, 16) cut to whole numbers; first and last stay."""
    frames = torch.arange(10).view(10, 1, 1, 1)
    clip = video.repeat_frames(video.Clip(frames, 0.5), 16)
    shown = clip.frames.flatten().tolist()
    assert shown == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 9]
    assert clip.seconds == pytest.approx(0.5 * 9 / 15)


@pytest.mark.parametrize("name", ["toy", "clevrer_video_12176.mp4", "mmvu_mechanics_8.mp4"])
def test_frames_are_those_that_decord_reads(name, world, sample):
    """decord is what the official code decodes with, and is here for this comparison alone: it
    cannot be told which container to open, and reads some of them wrongly (docs/deviations.md)."""
    decord = pytest.importorskip("decord")
    path = world / "clips/train_000.mp4" if name == "toy" else sample(name)
    clip, reader = read_clip(path), decord.VideoReader(str(path), num_threads=1)
    indices = frame_indices(len(reader), reader.get_avg_fps())
    theirs = reader.get_batch(indices).asnumpy()
    assert np.array_equal(clip.frames.permute(0, 2, 3, 1).numpy(), theirs)
    assert clip.seconds == (indices[-1] - indices[0]) / (len(indices) - 1) / reader.get_avg_fps()
