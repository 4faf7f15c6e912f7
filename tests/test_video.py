"""Frames, patches and position ids against transformers and against files no one here wrote."""

import json
import os

import numpy as np
import pytest
import torch

import loader
import toy
import video
from video import Geometry, VideoError, frame_indices, mrope_positions, read_clip, resized_shape

# Position ids of Qwen2.5-VL as transformers 4.50.0 computes them, the version of the official
# recipe, for text, <vision_start>, t x h x w video tokens, <vision_end>, text: (grid in patches,
# seconds per temporal patch, text before, text after) -> first position of each temporal patch, and
# position of <vision_end>.
TRANSFORMERS_4_50 = [
    ((5, 4, 6), 1.0, 3, 4, [4, 6, 8, 10, 12], 13),
    ((5, 4, 6), 0.5, 3, 4, [4, 5, 6, 7, 8], 9),
    ((8, 8, 6), 7.5, 1, 2, [2, 17, 32, 47, 62, 77, 92, 107], 108),
]
VIDEO_ID = 9


def prompt_ids(grid, before, after):
    tokens = grid[0] * grid[1] * grid[2] // 4
    return torch.tensor([5] * before + [1] + [VIDEO_ID] * tokens + [2] + [5] * after)


@pytest.mark.parametrize("grid, seconds, before, after, time, end", TRANSFORMERS_4_50)
def test_positions_equal_transformers_4_50(grid, seconds, before, after, time, end):
    ids = prompt_ids(grid, before, after)
    positions = mrope_positions(ids, VIDEO_ID, grid, seconds, Geometry())
    h, w, start = grid[1] // 2, grid[2] // 2, before + 1
    t_axis, h_axis, w_axis = positions[:, start : start + grid[0] * h * w].tolist()
    assert t_axis == [t for t in time for _ in range(h * w)]
    assert h_axis == [start + y for _ in time for y in range(h) for _ in range(w)]
    assert w_axis == [start + x for _ in time for _ in range(h) for x in range(w)]
    assert (positions[:, :start] == torch.arange(start)).all()
    assert (positions[:, -after - 1 :] == torch.arange(end, end + after + 1)).all()


def test_positions_equal_every_number_of_the_4_50_file(sample):
    for case in json.loads(sample("mrope_transformers_4_50.json").read_text()):
        grid = tuple(case["video_grid_thw"])
        ids = prompt_ids(grid, case["text_before"], case["text_after"])
        geometry = Geometry(tokens_per_second=case["tokens_per_second"])
        positions = mrope_positions(ids, VIDEO_ID, grid, case["second_per_grid_t"], geometry)
        assert positions.tolist() == case["position_ids"]


def test_qwen2_vl_counts_temporal_patches_and_ignores_seconds():
    positions = mrope_positions(
        prompt_ids((3, 4, 4), 2, 1), VIDEO_ID, (3, 4, 4), 7.5, Geometry(tokens_per_second=None)
    )
    assert positions[0].tolist() == [0, 1, 2] + [3] * 4 + [4] * 4 + [5] * 4 + [6, 7]


def test_intervals_below_a_second_do_not_collapse():
    """0.6 s per temporal patch at 2 positions a second: 0, 1.2, 2.4, 3.6 stay apart."""
    positions = mrope_positions(prompt_ids((4, 2, 2), 0, 0), VIDEO_ID, (4, 2, 2), 0.6, Geometry())
    assert positions[0, 1:5].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("ids", [[5, 9, 9, 9, 5], [9, 9, 5, 9, 9], [5, 5]])
def test_positions_refuse_video_tokens_that_do_not_fit_the_grid(ids):
    with pytest.raises(ValueError, match="video tokens"):
        mrope_positions(torch.tensor(ids), VIDEO_ID, (1, 4, 4), 1.0, Geometry())


@pytest.mark.parametrize(
    "total, rate, count",
    [
        (128, 25.0, 10), (240, 24.0, 16), (8, 4.0, 4), (3, 30.0, 2), (2, 1.0, 2),
        (30, 30.0, 4), (70, 30.0, 4), (5, 5.0, 4), (90000, 25.0, 16),
    ],
)  # fmt: skip
def test_frame_indices(total, rate, count):
    """About 2 a second, even, 4 to 16, no more than there are; from the first to the last."""
    indices = frame_indices(total, rate)
    assert len(indices) == count
    assert (indices[0], indices[-1]) == (0, total - 1)
    assert all(a < b for a, b in zip(indices, indices[1:], strict=False))


@pytest.mark.parametrize(
    "total, rate, indices",
    [
        (128, 25.0, [0, 14, 28, 42, 56, 71, 85, 99, 113, 127]),  # a CLEVRER clip
        (240, 24.0, [0, 16, 32, 48, 64, 80, 96, 112, 127, 143, 159, 175, 191, 207, 223, 239]),
        (8, 4.0, [0, 2, 5, 7]), (3, 30.0, [0, 2]), (6, 1.0, [0, 1, 2, 3, 4, 5]),
        (100, 29.97, [0, 20, 40, 59, 79, 99]),
    ],
)  # fmt: skip
def test_frame_indices_by_number(total, rate, indices):
    """round(linspace(0, total - 1, count)), count the even number at or below 2 * seconds."""
    assert frame_indices(total, rate) == indices


@pytest.mark.parametrize(
    "height, width, expected",
    [
        (320, 480, (308, 476)), (360, 640, (280, 504)), (56, 56, (336, 336)),
        (1080, 1920, (280, 504)), (28, 2800, (56, 3192)),
    ],
)  # fmt: skip
def test_resized_shape_keeps_the_pixel_budget(height, width, expected):
    assert resized_shape(height, width) == expected


def test_real_clevrer_clip_gives_10_frames_and_935_tokens(sample):
    clip = read_clip(sample("clevrer_video_12176.mp4"))
    assert clip.frames.shape == (10, 3, 320, 480) and clip.frames.dtype == torch.uint8
    assert clip.seconds == pytest.approx(127 / 9 / 25)
    patches, grid = video.patchify(video.resize(clip.frames, *resized_shape(320, 480)), Geometry())
    assert grid == (5, 22, 34) and len(patches) // 4 == 935
    assert clip.frames.float().std() > 10  # a picture, not a blank


def test_decord_and_pyav_return_the_same_frames(world, sample):
    pytest.importorskip("decord")
    for path in (world / "clips/train_000.mp4", sample("mmvu_mechanics_8.mp4")):
        ours, theirs = (
            decode(str(path), 2.0, 16) for decode in (video._decode_av, video._decode_decord)
        )
        assert ours[1:] == theirs[1:]
        assert (ours[0].float() - theirs[0].float()).abs().mean() < 1.0


def test_without_decord_pyav_is_used(world, monkeypatch):
    expected = read_clip(world / "clips/train_000.mp4")
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    clip = read_clip(world / "clips/train_000.mp4")
    assert clip.seconds == expected.seconds
    assert (clip.frames.float() - expected.frames.float()).abs().mean() < 1.0


def test_toy_clips_show_their_colours(tmp_path):
    frames = toy.draw_clip(["red", "blue"], np.random.default_rng(0))
    toy.write_mp4(tmp_path / "clip.mp4", frames, toy.RATE)
    clip = read_clip(tmp_path / "clip.mp4")
    pixels = clip.frames.permute(0, 2, 3, 1).reshape(-1, 3).float()
    for colour in toy.COLOURS:
        near = (pixels - torch.tensor(toy.COLOURS[colour])).abs().max(1).values < 40
        assert (near.sum() > 200) == (colour in ("red", "blue"))


def test_patches_equal_transformers_image_processor():
    """A still clip is one picture twice: transformers' PIL processor makes the same patches."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (308, 476, 3), dtype=np.uint8)
    theirs = Qwen2VLImageProcessorPil()(
        picture, return_tensors="pt", min_pixels=4 * 784, max_pixels=16384 * 784
    )
    still = torch.from_numpy(picture).permute(2, 0, 1).expand(2, -1, -1, -1)
    patches, grid = video.patchify(still, Geometry())
    assert [list(grid)] == theirs["image_grid_thw"].tolist()
    assert (patches - theirs["pixel_values"]).abs().max() < 1e-5


def test_resize_is_bicubic_with_antialiasing():
    """Against Pillow, which rounds between its two passes: equal but for that rounding."""
    from PIL import Image

    # not over the whole range, because Pillow also clips between its passes
    picture = np.random.default_rng(0).integers(90, 166, (100, 140, 3), dtype=np.uint8)
    pillow = np.asarray(Image.fromarray(picture).resize((84, 56), Image.Resampling.BICUBIC)).astype(
        np.float32
    )
    ours = (
        video.resize(torch.from_numpy(picture).permute(2, 0, 1)[None], 56, 84)[0]
        .permute(1, 2, 0)
        .numpy()
    )
    assert np.abs(ours - pillow).max() <= 1.0


def make_truncated(path, world):
    data = (world / "clips/train_000.mp4").read_bytes()
    path.write_bytes(data[: len(data) // 2])


def make_one_frame(path, world):
    toy.write_mp4(path, toy.draw_clip(["red"], np.random.default_rng(0))[:1], toy.RATE)


BROKEN = {
    "missing": lambda path, world: None,
    "empty": lambda path, world: path.write_bytes(b""),
    "directory": lambda path, world: path.mkdir(),
    "text": lambda path, world: path.write_text(
        "not a video at all, but long enough to be one" * 100
    ),
    "truncated": make_truncated,
    "one_frame": make_one_frame,
    "fifo": lambda path, world: os.mkfifo(path),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_broken_files_are_named(kind, backend, tmp_path, world, monkeypatch):
    if backend == "pyav":
        monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    path = tmp_path / f"{kind}.mp4"
    BROKEN[kind](path, world)
    with pytest.raises(VideoError, match=f"{kind}.mp4: ") as error:
        read_clip(path)
    assert ("cannot be decoded" in str(error.value)) == (kind in ("text", "truncated"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(path))


# ------------------------------------------------------------------------------ the clip reader


def test_the_clip_reader_returns_what_read_clip_does(world):
    path = world / "clips/train_000.mp4"
    expected = video.load_clip(path)
    with loader.ClipReader() as reader:
        for _ in range(2):  # one process serves both
            clip = reader.load_clip(path)
            assert clip.seconds == expected.seconds and torch.equal(clip.frames, expected.frames)
        with pytest.raises(VideoError, match="gone.mp4: no such video file"):
            reader.load_clip(world / "gone.mp4")
        with pytest.raises(VideoError, match="train.jsonl: cannot be decoded"):
            reader.load_clip(world / "train.jsonl")
        assert reader.process.poll() is None


STUCK = """
import os, sys, time
sys.argv[0] = sys.path[0] = {project!r}
import loader
import video
real = video._decode_av

def decode(path, fps, max_frames):
    if path.endswith("hang.mp4"):
        time.sleep(15)
    if path.endswith("crash.mp4"):
        os.abort()
    return real(path, fps, max_frames)

video._decode_av = video._decode_decord = decode
loader.serve()
"""


@pytest.fixture
def stuck(world, tmp_path, monkeypatch):
    """Clips good, hang and crash, and a decoder that hangs on one name and dies on another."""
    script = tmp_path / "stuck.py"
    script.write_text(STUCK.format(project=os.path.dirname(os.path.abspath(video.__file__))))
    monkeypatch.setattr(loader, "__file__", str(script))
    good = (world / "clips/train_000.mp4").read_bytes()
    for name in ("good", "hang", "crash"):
        (tmp_path / f"{name}.mp4").write_bytes(good)
    return tmp_path


def test_a_clip_that_hangs_or_crashes_costs_itself_only(stuck):
    """The clips before and after are read all the same, by a new process."""
    with loader.ClipReader(timeout=20) as reader:
        reader.load_clip(stuck / "good.mp4")
        reader.timeout = 0.5
        with pytest.raises(VideoError, match="hang.mp4: not decoded within 0.5 s"):
            reader.load_clip(stuck / "hang.mp4")
        reader.timeout = 20
        with pytest.raises(VideoError, match="crash.mp4: the decoder crashed"):
            reader.load_clip(stuck / "crash.mp4")
        assert len(reader.load_clip(stuck / "good.mp4").frames) == 4


def test_workers_go_on_after_a_clip_that_crashes_and_close_on_one_that_hangs(stuck):
    workers = loader.ClipWorkers(1, timeout=60)
    names = ("good", "crash", "good", "hang")
    good, crash, again, _ = [workers.submit(stuck / f"{name}.mp4") for name in names]
    assert len(good.result(60).frames) == 4
    with pytest.raises(VideoError, match="crash.mp4: the decoder crashed"):
        crash.result(60)
    assert len(again.result(60).frames) == 4
    process = workers.readers[0].process
    workers.close()
    process.wait(10)  # killed, though its clip would have taken longer


def test_repeated_frames_by_hand():
    """10 frames as 16: linspace(0, 9, 16) cut to whole numbers; first and last stay."""
    frames = torch.arange(10).view(10, 1, 1, 1)
    clip = video.repeat_frames(video.Clip(frames, 0.5), 16)
    shown = clip.frames.flatten().tolist()
    assert shown == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 9]
    assert clip.seconds == pytest.approx(0.5 * 9 / 15)
