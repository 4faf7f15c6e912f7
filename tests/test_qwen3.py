"""Qwen3-VL through the same passes: prompts, positions, DeepStack, rollout and scoring, against
transformers' own model and processor."""

import copy
import json
import re
import subprocess
import time
import types

import pytest
import torch
from conftest import questions_of, run_twgrpo, twgrpo_command
from safetensors.torch import load_file
from test_policy import check_packed_scoring, check_rollout
from test_ranks import run_two
from test_train import metrics
from transformers import AutoModelForImageTextToText, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

import eval as evaluation
import toy
import twgrpo
import video
from data import Prompter
from files import UserError
from model.load import read_config
from model.policy import Policy
from records import Record
from run import plan
from run.config import Config, parse_config

CLIP = dict(max_frames=4, min_pixels=64 * 64, max_pixels=64 * 64)


def as_qwen3_vl(policy: Policy, tie: bool = False) -> Policy:
    """A Qwen3-VL of toy size with the same tokenizer: two DeepStack layers, heads of 32."""
    ours = policy.model.config
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    rope = dict(
        rope_type="default", rope_theta=5e6, mrope_section=[6, 5, 5], mrope_interleaved=True
    )
    text = dict(
        vocab_size=ours.text_config.vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.05,
        rope_parameters=rope,
        tie_word_embeddings=tie,
    )
    vision = dict(
        depth=3,
        hidden_size=64,
        num_heads=4,
        intermediate_size=128,
        out_hidden_size=96,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
        initializer_range=0.1,
    )
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=tie,
        **{name: getattr(ours, name) for name in ids},
    )
    torch.manual_seed(2)
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.generation_config = policy.model.generation_config
    return Policy(model, policy.tokenizer, policy.chat_template)


@pytest.fixture
def qwen3(policy):
    return as_qwen3_vl(policy)


@pytest.fixture
def prompter(qwen3):
    return Prompter(qwen3.tokenizer, qwen3.chat_template, qwen3.geometry, **CLIP)


@pytest.fixture
def questions(prompter, records):
    return questions_of(prompter, records)


def test_packed_scoring_equals_separate_sequences(qwen3, questions):
    names = check_packed_scoring(qwen3, questions)
    assert "model.visual.deepstack_merger_list.1.norm.bias" in names


def test_rollout_logps_equal_a_full_forward(qwen3, questions):
    check_rollout(qwen3, questions)


def test_positions_equal_transformers(qwen3, questions):
    for question in questions:
        is_video = (question.ids_P == qwen3.model.config.video_token_id).int()
        theirs, _ = qwen3.model.model.get_rope_index(
            question.ids_P[None],
            mm_token_type_ids=2 * is_video[None],
            video_grid_thw=torch.tensor([question.grid]),
        )
        assert torch.equal(question.positions_3P, theirs[:, 0])


def test_greedy_rollout_equals_generate(qwen3, questions):
    """Token for token, though transformers works out the positions itself."""
    qwen3.eos_ids = torch.tensor([-1])
    qwen3.banned_V[:] = False
    features = qwen3.encode_videos(questions)
    groups = qwen3.rollout(questions, features, 1, 12, 0.0, [(0, b) for b in range(3)])
    for question, group in zip(questions, groups, strict=True):
        ids = question.ids_P[None]
        theirs = qwen3.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == qwen3.model.config.video_token_id).int() * 2,
            pixel_values_videos=question.patches,
            video_grid_thw=torch.tensor([question.grid]),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=-1,
        )
        assert group.completions[0].tolist() == theirs[0, len(question.ids_P) :].tolist()


@pytest.mark.parametrize("name", ["clevrer_video_12176.mp4", "mmvu_mechanics_8.mp4"])
def test_a_real_clip_is_read_like_the_processor_reads_it(name, qwen3, sample):
    """Prompt and patches against the methods of transformers' own processors, which need the frames
    that were chosen and the rate of the file."""
    path = sample(name)
    prompter = Prompter(qwen3.tokenizer, qwen3.chat_template, qwen3.geometry, max_frames=10)
    question = prompter(Record("1", "What moves?", "<answer>A</answer>", path))
    clip = prompter.load_clip(*prompter.clip_arguments(question.record))
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


def as_tied_qwen2_5_vl(policy: Policy) -> Policy:
    """As Qwen2.5-VL-3B is: the lm_head is the embedding."""
    config = copy.deepcopy(policy.model.config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = type(policy.model)(config).eval()
    model.generation_config = policy.model.generation_config
    return Policy(model, policy.tokenizer, policy.chat_template)


@pytest.mark.parametrize("kind", ["qwen3_vl", "tied qwen3_vl", "tied qwen2_5_vl"])
def test_a_checkpoint_goes_through_from_pretrained(kind, policy, records, tmp_path):
    tie, is_qwen3 = kind.startswith("tied"), kind.endswith("qwen3_vl")
    ours = as_qwen3_vl(policy, tie) if is_qwen3 else as_tied_qwen2_5_vl(policy)
    prompter = Prompter(ours.tokenizer, ours.chat_template, ours.geometry, **CLIP)
    questions = questions_of(prompter, records)
    ours.save(tmp_path / "model")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").state_dict()
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    again = Policy.load(tmp_path / "model")
    if is_qwen3:
        assert again.geometry == video.Geometry(16, 2, 2, None, True, (0.5,) * 3, (0.5,) * 3)
    assert (again.head_VD is again.text.embed_tokens.weight) == tie
    copy_of_it = again._whole_copy()
    assert (copy_of_it.head_VD is copy_of_it.text.embed_tokens.weight) == tie
    for features, same in zip(
        copy_of_it.encode_videos(questions), ours.encode_videos(questions), strict=True
    ):
        assert torch.equal(features, same)


def test_dry_run_and_ask(policy, world, tmp_path, monkeypatch, capsys):
    as_qwen3_vl(policy).save(tmp_path / "model")
    flags = f"--model_name_or_path {tmp_path / 'model'} --jsonl_path {world / 'train.jsonl'} "
    flags += (
        f"--video_root {world} --dry_run true --max_frames 4 --min_pixels 4096 --max_pixels 4096"
    )
    assert twgrpo.train_and_evaluate(parse_config(flags.split())) is None
    assert "4 frames x 64 x 64 pixels, 0.58 s apart = 8 video tokens" in capsys.readouterr().out
    clip = world / "clips" / "train_000.mp4"
    flags = f"ask --model {tmp_path / 'model'} --video {clip} --question What? --max_frames 4 "
    flags += "--min_pixels 4096 --max_pixels 4096 --max_completion_length 6"
    monkeypatch.setattr("sys.argv", ["eval.py", *flags.split()])
    evaluation.main()
    assert re.search(r"\([1-6] tokens(, cut off)?; prompt [0-9]+\)", capsys.readouterr().out)


def test_models_with_linear_attention_are_refused_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="qwen3_5")))
    with pytest.raises(UserError, match="is a 'qwen3_5' model; .* linear attention carries state"):
        read_config(tmp_path)


# 4B and 8B as published: layers, hidden, intermediate, heads, tied, vision tower.
SMALL = dict(
    depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17]
)
SHAPES = {"4b": (36, 2560, 9728, 32, True, SMALL), "8b": (36, 4096, 12288, 32, False, {})}


@pytest.mark.parametrize("size, billions", [("4b", 4.44), ("8b", 8.77)])
def test_the_plan_of_a_published_size(size, billions, policy, monkeypatch):
    """The cache goes by the config's head_dim, 128; tied embeddings are counted once."""
    layers, hidden, intermediate, heads, tie, vision = SHAPES[size]
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=151936,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=tie,
        ),
        vision_config=dict(out_hidden_size=hidden, **vision),
        tie_word_embeddings=tie,
    )
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    big = Policy(model, policy.tokenizer, policy.chat_template)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e9 == pytest.approx(billions, abs=0.01)
    for gpus in (1, 2):
        monkeypatch.setattr("model.ranks.world", lambda gpus=gpus: gpus)
        parts = plan.memory(Config(), big, prompt=1100)
        length = 1100 + 8 * Config().max_completion_length
        assert parts["rollout: keys and values, bf16"] == 2 * layers * 8 * 128 * 2 * length
        assert parts["always: parameters, float32"] == pytest.approx(4 * parameters / gpus)


# -------------------------------------------------------------------------------- the whole loop


@pytest.fixture(scope="module")
def warm(world, records, tmp_path_factory):
    """A tied Qwen3-VL after a short warm start on the toy's clips, as a checkpoint."""
    qwen3 = as_qwen3_vl(Policy.load(world / "model"), tie=True)
    prompter = Prompter(qwen3.tokenizer, qwen3.chat_template, qwen3.geometry, **CLIP)
    toy.warm_start(qwen3, [prompter(r) for r in records], seed=0, steps=100)
    path = tmp_path_factory.mktemp("qwen3") / "model"
    qwen3.save(path)
    return path


@pytest.mark.slow
def test_it_learns(warm, world, tmp_path, capsys):
    """60 steps of the loop on the toy's clips: the reward rises."""
    flags = f"--model_name_or_path {warm} --max_steps 60 --per_device_train_batch_size 6"
    flags += " --num_generations 8 --learning_rate 1e-3 --min_pixels 4096 --max_pixels 4096"
    result = run_twgrpo(world, tmp_path / "r", *flags.split())
    assert result.returncode == 0, result.stderr[-3000:]
    reward = [row["reward"] for row in metrics(tmp_path / "r")]
    before, after = sum(reward[:10]) / 10, sum(reward[-10:]) / 10
    with capsys.disabled():
        print(f"\nQwen3-VL, 60 steps on the toy: reward {before:.2f} -> {after:.2f}")
    assert after > before + 0.1


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_train_like_one_and_a_resumed_run_has_the_same_bits(warm, world, tmp_path):
    flags = f"--model_name_or_path {warm} --max_steps 4 --save_steps 2 --learning_rate 1e-3".split()
    flags += "--min_pixels 4096 --max_pixels 4096".split()
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    result = run_twgrpo(world, one, *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    result = run_two(world, two, *flags, "--per_device_train_batch_size", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert any(row["grad_norm"] > 0.01 for row in metrics(one))
    ours, theirs = (load_file(run / "checkpoint-4/model.safetensors") for run in (one, two))
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-4

    command = twgrpo_command(world, again, *flags)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not (again / "checkpoint-2").exists():
            assert run.poll() is None
            time.sleep(0.02)
        run.kill()
    result = run_twgrpo(world, again, *flags, "--resume_from_checkpoint", "auto")
    assert result.returncode == 0, result.stderr[-3000:]
    theirs = load_file(again / "checkpoint-4/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
