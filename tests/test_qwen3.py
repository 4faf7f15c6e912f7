"""Qwen3-VL and models with tied embeddings: prompts against transformers' own processor,
checkpoints, the plan, and the whole loop. The passes of every family are in test_policy.py."""

import subprocess
import time
import types

import pytest
import torch
from conftest import questions_of, run_twgrpo, twgrpo_command
from safetensors.torch import load_file
from test_policy import as_family, prompter_for
from test_ranks import run_two
from test_train import metrics
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

import toy
import video
from data import Prompter
from model.policy import Policy
from records import Record
from run import plan
from run.config import Config


@pytest.fixture
def qwen3(policy):
    return as_family("qwen3_vl", policy)


@pytest.mark.parametrize("name", ["clevrer_video_12176.mp4", "mmvu_mechanics_8.mp4"])
def test_a_real_clip_is_read_like_the_processor_reads_it(name, qwen3, sample):
    """Prompt and patches against the methods of transformers' own processors, which need the frames
    that were chosen and the rate of the file."""
    path = sample(name)
    clips = video.ClipSettings(max_frames=10)
    prompter = Prompter(qwen3.tokenizer, qwen3.chat_template, qwen3.geometry, clips=clips)
    question = prompter(Record("1", "What moves?", "<answer>A</answer>", path))
    clip = prompter.load_clip(path, clips, prompter.geometry.factor)
    rate = dict(clevrer_video_12176=25, mmvu_mechanics_8=24)[path.stem]
    indices = [round(seconds * rate) for seconds in clip.times]
    merge = types.SimpleNamespace(merge_size=2, temporal_patch_size=2)
    tokens = {f"{n}_token": f"<|{n}|>" for n in ("vision_start", "vision_end")}
    theirs = types.SimpleNamespace(video_processor=merge, video_token="<|video_pad|>", **tokens)
    theirs._calculate_timestamps = types.MethodType(Qwen3VLProcessor._calculate_timestamps, theirs)
    grid = torch.tensor([question.grid])
    metadata = types.SimpleNamespace(fps=rate, frames_indices=indices)
    inputs = dict(video_grid_thw=grid, video_metadata=[metadata])
    blocks = Qwen3VLProcessor.replace_video_token(theirs, inputs, 0)
    wrapped = "<|vision_start|><|video_pad|><|vision_end|>"  # all of it, as in transformers 4.57
    text = question.prompt.replace(wrapped, blocks)
    assert text.count(" seconds><|vision_start|><|video_pad|>") == question.grid[0] == 5
    assert question.ids_P.tolist() == qwen3.tokenizer(text)["input_ids"]
    frames = (clip.frames.float() / 255 - 0.5) / 0.5
    patches, t, h, w = Qwen3VLVideoProcessor.patchify(None, frames[None], 16, 2, 2)
    assert (t, h, w) == question.grid
    assert (question.patches - patches[0]).abs().max() < 1e-6


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_checkpoint_is_an_ordinary_one_in_its_own_dtype(kind, tie, policy, records, tmp_path):
    """Tied: as in the small ones, the lm_head is the embedding. So it is in the gathered copy."""
    ours = as_family(kind, policy, tie)
    ours.save_dtype = torch.bfloat16  # in which Qwen's checkpoints come
    for name in ("preprocessor", "video_preprocessor", "processor"):  # for other programs
        (tmp_path / f"{name}_config.json").write_text("{}")
    ours.save(tmp_path / "model", processor_from=str(tmp_path))
    assert len(list((tmp_path / "model").glob("*processor_config.json"))) == 3
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype="auto")
    assert_close(theirs.state_dict(), ours.model.bfloat16().state_dict(), rtol=0, atol=0)
    assert theirs.generation_config.eos_token_id == policy.model.generation_config.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("<|im_start|>A. red") == policy.tokenizer("<|im_start|>A. red")

    again = Policy.load(tmp_path / "model")
    assert again.save_dtype == torch.bfloat16
    if kind == "qwen3_vl":
        for one in (again, Policy.load(tmp_path / "model", "meta")):  # as for a dry run
            assert one.geometry == video.Geometry(16, 2, 2, None, True, (0.5,) * 3, (0.5,) * 3)
    questions, copied = questions_of(prompter_for(again), records), again._whole_copy()
    for one in (again, copied):
        assert (one.head_VD is one.text.embed_tokens.weight) == tie
    features = (one.encode_videos(questions) for one in (again, copied))
    assert all(map(torch.equal, *features))


@pytest.mark.parametrize("tie", [False, True])
def test_the_plan_counts_caches_by_head_size_and_tied_embeddings_once(tie, policy, monkeypatch):
    qwen3 = as_family("qwen3_vl", policy, tie)  # heads of 32, though 96 / 4 would be 24
    parameters, length = sum(p.numel() for p in qwen3.model.parameters()), 1100 + 8 * 1024
    for gpus in (1, 2):
        monkeypatch.setattr("model.ranks.world", lambda gpus=gpus: gpus)
        phases = plan.memory(Config(), qwen3, prompt=1100)
        assert phases["rollout"]["keys and values, bf16"] == 2 * 3 * 2 * 32 * 2 * length
        assert phases["always"]["parameters, float32"] == 4 * parameters / gpus


# -------------------------------------------------------------------------------- the whole loop


@pytest.fixture(scope="module")
def warm(world, records, tmp_path_factory):
    """A tied Qwen3-VL after a short warm start on the toy's clips, as a checkpoint."""
    qwen3 = as_family("qwen3_vl", Policy.load(world / "model"), tie=True)
    toy.warm_start(qwen3, list(map(prompter_for(qwen3), records)), seed=0, steps=100)
    path = tmp_path_factory.mktemp("qwen3") / "model"
    qwen3.save(path)
    return path


@pytest.mark.slow
def test_it_learns(warm, world, tmp_path):
    """60 steps of the loop on the toy's clips: the reward rises."""
    flags = f"--model_name_or_path {warm} --max_steps 60 --per_device_train_batch_size 6"
    flags += " --num_generations 8 --learning_rate 1e-3 --min_pixels 4096 --max_pixels 4096"
    run_twgrpo(world, tmp_path / "r", *flags.split())
    reward = [row["reward"] for row in metrics(tmp_path / "r")]
    before, after = sum(reward[:10]) / 10, sum(reward[-10:]) / 10
    assert after > before + 0.1


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_train_like_one_and_a_resumed_run_has_the_same_bits(warm, world, tmp_path):
    flags = f"--model_name_or_path {warm} --max_steps 4 --save_steps 2 --learning_rate 1e-3".split()
    flags += "--min_pixels 4096 --max_pixels 4096".split()
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    run_twgrpo(world, one, *flags)
    run_two(world, two, *flags, "--per_device_train_batch_size", "1")
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert any(row["grad_norm"] > 0.01 for row in metrics(one))
    ours, theirs = (load_file(run / "checkpoint-4/model.safetensors") for run in (one, two))
    assert_close(ours, theirs, rtol=0, atol=1e-4)

    command = twgrpo_command(world, again, *flags)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not (again / "checkpoint-2").exists():
            assert run.poll() is None
            time.sleep(0.02)
        run.kill()
    run_twgrpo(world, again, *flags, "--resume_from_checkpoint", "auto")
    theirs = load_file(again / "checkpoint-4/model.safetensors")
    assert_close(ours, theirs, rtol=0, atol=0)
