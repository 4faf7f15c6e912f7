"""The policy's three passes against transformers' own model, given one padded row per completion.

What transformers computes here is its full forward pass with our position ids: token embeddings,
video features in place, causal attention over the sequence, logits. Packing, the prefilled cache
and padding must change nothing.
"""

import math
import statistics
import time
import types

import numpy as np
import pytest
import torch
from conftest import questions_of, random_completions
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import eval as evaluation
import toy
from benchmarks.step import SIZES
from data import TEMPLATES, Prompter
from files import UserError
from model import rollout
from model.packing import Group
from model.policy import Policy
from model.rollout import sample
from records import Record

LENGTHS = [[5, 1, 9, 3], [2, 2, 2, 7], [1, 1, 1, 1]]


def groups_of(policy, questions, lengths=LENGTHS):
    return [
        Group(question, random_completions(policy, ls, seed), [True] * len(ls), [""] * len(ls))
        for seed, (question, ls) in enumerate(zip(questions, lengths, strict=True))
    ]


def separate_logits(policy, group) -> list[torch.Tensor]:
    """Transformers' logits for each completion, from a sequence of its own: G x (len_i, V)."""
    question, rows = group.question, []
    P = len(question.ids_P)
    for completion in group.completions:
        after = question.positions_3P.max() + 1 + torch.arange(len(completion)).expand(3, -1)
        logits = policy.model(
            input_ids=torch.cat([question.ids_P, completion])[None],
            position_ids=torch.cat([question.positions_3P, after], dim=1)[:, None],
            pixel_values_videos=question.patches,
            video_grid_thw=torch.tensor([question.grid]),
        ).logits[0]
        rows.append(logits[P - 1 : P - 1 + len(completion)])
    return rows


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def gradients(policy):
    return {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def as_qwen2_vl(policy) -> Policy:
    """A Qwen2-VL of toy size with the same tokenizer: other vision tower, no absolute time."""
    ours = policy.model.config
    text = dict(ours.text_config.to_dict(), model_type="qwen2_vl_text")
    vision = dict(depth=1, embed_dim=64, hidden_size=96, num_heads=4, mlp_ratio=2)
    names = "image_token_id video_token_id vision_start_token_id vision_end_token_id".split()
    ids = {name: getattr(ours, name) for name in names}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(1)
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.generation_config = policy.model.generation_config
    return Policy(model, policy.tokenizer, policy.chat_template)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2_vl"])
def test_packed_scoring_equals_separate_sequences(kind, policy, records):
    """Logits within 1e-5, gradients within 1e-4: three questions of different length at once."""
    if kind == "qwen2_vl":
        policy = as_qwen2_vl(policy)
        assert policy.geometry.tokens_per_second is None
    prompter = Prompter(policy.tokenizer, policy.chat_template, policy.geometry, **toy.CLIP)
    names = check_packed_scoring(policy, questions_of(prompter, records))
    assert len(names) > 30


def check_packed_scoring(policy, questions) -> set[str]:
    """Packed rows against separate sequences. Returns the parameters that have gradients."""
    groups = groups_of(policy, questions)
    hidden = policy.hidden_states(groups, policy.encode_videos(questions))
    packed = [policy.model.lm_head(h) for h in hidden]
    separate = [torch.cat(separate_logits(policy, group)) for group in groups]
    for ours, theirs in zip(packed, separate, strict=True):
        assert (ours - theirs).abs().max() < 1e-5

    probe = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) for x in packed]
    sum((x * p).sum() for x, p in zip(packed, probe, strict=True)).backward()
    ours = gradients(policy)
    policy.model.zero_grad()
    sum((x * p).sum() for x, p in zip(separate, probe, strict=True)).backward()
    theirs = gradients(policy)
    assert ours.keys() == theirs.keys()
    assert max(relative(ours[name], theirs[name]) for name in ours) < 1e-4
    return set(ours)


def test_rollout_logps_equal_a_full_forward(policy, questions):
    """What decoding recorded at every step, against transformers' logits of the sequence."""
    groups = check_rollout(policy, questions)
    assert {len(g.completions) for g in groups} == {3}


def check_rollout(policy, questions) -> list[Group]:
    features = policy.encode_videos(questions)
    groups = policy.rollout(questions, features, 3, 12, 1.0, [(0, b) for b in range(3)])
    for group in groups:
        logps = [
            rows.log_softmax(-1).gather(1, c[:, None])[:, 0]
            for rows, c in zip(separate_logits(policy, group), group.completions, strict=True)
        ]
        assert (group.sampled_logps_N - torch.cat(logps)).abs().max() < 1e-5
    return groups


def test_a_float32_policy_decodes_under_autocast(policy, questions, monkeypatch):
    """As on a GPU: keys are float32 once they are rotated, values bf16. The scoring agrees."""
    monkeypatch.setattr(policy, "compute", lambda: torch.autocast("cpu", torch.bfloat16))
    with torch.no_grad():
        features = policy.encode_videos(questions)
        groups = policy.rollout(questions, features, 3, 12, 1.0, [(0, b) for b in range(3)])
        hidden = policy.hidden_states(groups, features)
    for group, hidden_ND in zip(groups, hidden, strict=True):
        logps = policy.model.lm_head(hidden_ND.float()).log_softmax(-1)
        scored_N = logps.gather(1, group.targets_N[:, None])[:, 0]
        assert (group.sampled_logps_N - scored_N).abs().max() < 0.1


def test_rollout_last_logits_equal_a_full_forward(policy, questions, monkeypatch):
    seen = []
    head = rollout.head_logits
    monkeypatch.setattr(rollout, "head_logits", lambda *args: seen.append(head(*args)) or seen[-1])
    policy.eos_ids = torch.tensor([-1])  # so that no row ends early
    features = policy.encode_videos(questions)
    groups = policy.rollout(questions, features, 2, 10, 1.0, [(0, b) for b in range(3)])
    last_RV = seen[9]
    monkeypatch.undo()
    for b, group in enumerate(groups):
        for i, rows in enumerate(separate_logits(policy, group)):
            assert (last_RV[2 * b + i] - rows[-1]).abs().max() < 1e-5


def test_greedy_rollout_equals_taking_the_best_token_of_a_full_forward(policy, questions):
    features = policy.encode_videos(questions)
    groups = policy.rollout(questions, features, 1, 8, 0.0, [(0,)] * 3)
    for group in groups:
        rows = separate_logits(policy, group)[0].masked_fill(policy.banned_V, -torch.inf)
        assert rows.argmax(-1).tolist() == group.completions[0].tolist()


def test_rollout_does_not_depend_on_what_else_is_in_the_batch(policy, questions):
    def completions(chosen):
        picked = [questions[b] for b in chosen]
        groups = policy.rollout(
            picked, policy.encode_videos(picked), 4, 10, 1.0, [(5, b) for b in chosen]
        )
        return [[c.tolist() for c in g.completions] for g in groups]

    together = completions([0, 1, 2])
    assert completions([2]) == together[2:]
    assert completions([1, 0]) == [together[1], together[0]]
    assert together[0] != together[1] and len({tuple(c) for c in together[0]}) > 1


def test_completions_end_with_their_first_end_token(policy, questions):
    policy.eos_ids = (~policy.banned_V).nonzero()[
        ::7, 0
    ]  # so many that rows end at different places
    features = policy.encode_videos(questions)
    groups = policy.rollout(questions, features, 4, 12, 1.0, [(0, b) for b in range(3)])
    ends = set(policy.eos_ids.tolist())
    for group in groups:
        assert len(group.sampled_logps_N) == int(group.lengths_G.sum()) == len(group.targets_N)
        for completion, finished in zip(group.completions, group.finished, strict=True):
            assert (completion[-1].item() in ends) == finished
            assert not ends & set(completion[:-1].tolist())
            assert finished or len(completion) == 12
    assert len({len(c) for g in groups for c in g.completions}) > 2


def test_vision_ids_and_words_beyond_the_tokenizer_are_never_sampled(policy):
    names = "vision_start vision_end vision_pad image_pad video_pad".split()
    banned = [policy.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]
    assert policy.banned_V[banned].all() and policy.banned_V.sum() == 5
    V = len(policy.banned_V)
    logits = torch.zeros(2000, V)
    logits[:, banned] = 9.0
    uniform = torch.from_numpy(np.random.default_rng(0).random(2000))
    for temperature in (0.0, 1.0):
        tokens, _ = sample(logits, temperature, uniform, policy.banned_V)
        assert not policy.banned_V[tokens].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_draw_the_tokens_of_eager_ones(policy, questions, monkeypatch):
    policy.eos_ids = torch.tensor([-1])  # never end
    policy.model.cuda()
    with torch.no_grad(), policy.gathered() as actor:
        features = actor.encode_videos(questions)
        arguments = questions, features, 4, 84, 1.0, [(1,), (2,), (3,)]
        captured = actor.rollout(*arguments)
        monkeypatch.setattr(rollout.Decoder, "_captured_step", lambda decoder: decoder.step)
        eager = actor.rollout(*arguments)
    for a, b in zip(captured, eager, strict=True):
        assert all(map(torch.equal, a.completions, b.completions))
        assert (a.sampled_logps_N - b.sampled_logps_N).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_whole_softmax(temperature):
    """100,000 draws against the probabilities: no hidden top-k, the temperature applied once."""
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(0)) * 2
    draws = 100_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(draws))
    tokens, logps = sample(
        logits.expand(draws, -1), temperature, uniform, torch.zeros(60, dtype=torch.bool)
    )
    expected = (logits[0].double() / temperature).softmax(0)
    counts = torch.bincount(tokens, minlength=60).double()
    chi_square = ((counts - draws * expected) ** 2 / (draws * expected)).sum()
    assert chi_square < 59 + 5 * (2 * 59) ** 0.5
    assert torch.allclose(logps.double(), expected.log()[tokens], atol=1e-5)


def test_sampling_at_the_edges_of_the_uniform_number():
    logits = torch.tensor([[-30.0, 0.0, 0.0, -30.0]]).expand(2, -1)
    banned = torch.tensor([True, False, False, True])
    tokens, _ = sample(logits, 1.0, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), banned)
    assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize("kind, calls", [("qwen2_5_vl", 4 + 4 + 2), ("qwen2_vl", 2)])
def test_the_vision_tower_attends_in_batches(kind, calls, policy, monkeypatch):
    """Clips of two sizes, their windows cut off at the borders, in two windowed layers and a full
    one: the tower of transformers, which calls attention once per window, and its gradients."""
    model = toy.build_model(policy.tokenizer, vision_depth=3)
    policy = Policy(model, policy.tokenizer, policy.chat_template)
    policy = as_qwen2_vl(policy) if kind == "qwen2_vl" else policy
    sizes = [(2, 22, 34), (1, 6, 10), (3, 22, 34)]
    clips = [types.SimpleNamespace(grid=s, patches=torch.randn(math.prod(s), 1176)) for s in sizes]
    counted, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **more: counted.append(1) or attend(*args, **more),
    )

    ours = torch.cat(policy.encode_videos(clips))
    assert len(counted) == calls  # four lengths of windows, two of frames
    ours.square().mean().backward()
    our_gradients = gradients(policy)
    policy.model.zero_grad()
    patches, grids = torch.cat([clip.patches for clip in clips]), torch.tensor(sizes)
    theirs = policy.vision(patches, grid_thw=grids).pooler_output
    assert len(counted) >= 3 * calls
    assert (ours - theirs).abs().max() < 1e-5
    theirs.square().mean().backward()
    for name, gradient in gradients(policy).items():
        assert relative(our_gradients[name], gradient) < 1e-5, name


def test_on_cuda_an_evaluation_holds_its_weights_once(world, policy, monkeypatch):
    """In bf16 from the start, so that 7B fits 24 GB; training's float32 weights need a copy."""
    for module in ("eval", "model.policy"):
        monkeypatch.setattr(f"{module}.compute_dtype", lambda device: torch.bfloat16)
    seen = []
    monkeypatch.setattr(evaluation, "answer", lambda cfg, policy, *_: seen.append(policy) or [])
    with policy.gathered() as copy:
        assert copy is not policy
        monkeypatch.delattr(Policy, "_whole_copy")
        args = evaluation.parser().parse_args(
            f"ask --model {world}/model --video v --question q".split()
        )
        assert not list(evaluation.answers(args, evaluation.settings(args), [], []))
        (loaded,) = seen
        for ours, theirs in zip(loaded.model.parameters(), copy.model.parameters(), strict=True):
            assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)
        for ours, theirs in zip(loaded.model.buffers(), copy.model.buffers(), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_frozen_vision_gets_no_gradient(world, prompter, records):
    policy = Policy.load(world / "model", freeze_vision_modules=True)
    questions = [prompter(records[0])]
    features = policy.encode_videos(questions)
    assert not any(p.requires_grad for p in policy.vision.parameters())
    assert not features[0].requires_grad
    policy.hidden_states(groups_of(policy, questions, LENGTHS[:1]), features)[0].sum().backward()
    assert all(p.grad is None for p in policy.vision.parameters())


def test_saved_checkpoint_is_an_ordinary_one(world, policy, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"patch_size": 14}')
    policy.save(tmp_path / "saved", processor_from=str(tmp_path / "base"))
    model, tokenizer = (
        cls.from_pretrained(tmp_path / "saved")
        for cls in (AutoModelForImageTextToText, AutoTokenizer)
    )
    for name, parameter in policy.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], parameter), name
    assert (
        tokenizer("<|im_start|>A. red")["input_ids"]
        == policy.tokenizer("<|im_start|>A. red")["input_ids"]
    )
    assert model.generation_config.eos_token_id == policy.model.generation_config.eos_token_id
    assert (tmp_path / "saved" / "preprocessor_config.json").exists()


def test_processor_chat_template_comes_before_the_tokenizers(world, policy, tmp_path):
    policy.save(tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "m" / "chat_template.json").write_text('{"chat_template": "from the processor"}')
    assert Policy.load(tmp_path / "m").chat_template == "from the processor"


def test_what_is_not_a_qwen_vl_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such model directory"):
        Policy.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: not a checkpoint"):
        Policy.load(tmp_path / "empty")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match="text: is a 'qwen2' model"):
        Policy.load(tmp_path / "text")


def test_a_checkpoint_without_weights_is_refused(world, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((world / "model" / "config.json").read_text())
    with pytest.raises(UserError, match="bare: its weights or tokenizer cannot be loaded"):
        Policy.load(tmp_path / "bare")


# -------------------------------------------------------------------------------------- how fast


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """About 30 M parameters, a prompt of about 600 tokens, G = 8 completions of 64 tokens."""
    root = tmp_path_factory.mktemp("big")
    frames = np.random.default_rng(0).integers(0, 255, (10, 280, 280, 3), dtype=np.uint8)
    toy.write_mp4(root / "clip.mp4", frames, rate=2)
    tokenizer = toy.build_tokenizer(list(TEMPLATES.values()))
    model = toy.build_model(tokenizer, **SIZES["tiny"])
    policy = Policy(model.eval(), tokenizer, toy.CHAT_TEMPLATE)
    policy.vision.requires_grad_(False)
    policy.eos_ids = torch.tensor([-1])  # every completion runs to its 64 tokens
    prompter = Prompter(tokenizer, toy.CHAT_TEMPLATE, policy.geometry, min_pixels=1)

    question = prompter(Record("1", "What?", "<answer>A</answer>", root / "clip.mp4"))
    assert 580 < len(question.ids_P) < 640
    assert 25e6 < sum(p.numel() for p in model.parameters()) < 40e6
    return policy, question


def alternate(ours, theirs, repeats=2):
    """Median seconds of each, run in turn so that a busy machine disturbs both."""
    times = ([], [])
    for _ in range(repeats):
        for function, seconds in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def eight_copies(policy, question, G=8):
    """The video tensors as the official trainer makes them: G times over."""
    return dict(
        pixel_values_videos=question.patches.repeat(G, 1),
        video_grid_thw=torch.tensor([question.grid] * G),
    )


@pytest.mark.slow
def test_packed_scoring_is_at_least_twice_as_fast(big, capsys):
    """Forward and backward of one packed row against eight padded copies through transformers."""
    policy, question = big
    group = groups_of(policy, [question], [[64] * 8])[0]
    after = question.positions_3P.max() + 1 + torch.arange(64).expand(3, -1)
    ids_GL = torch.stack([torch.cat([question.ids_P, c]) for c in group.completions])
    positions = torch.cat([question.positions_3P, after], dim=1)[:, None].expand(-1, 8, -1)

    def ours():
        policy.model.zero_grad()
        with torch.no_grad():
            features = policy.encode_videos([question])
        logits = policy.model.lm_head(policy.hidden_states([group], features)[0])
        logits.log_softmax(-1).gather(1, group.targets_N[:, None]).mean().backward()
        ours.gradient = policy.text.layers[0].self_attn.q_proj.weight.grad

    def theirs():
        policy.model.zero_grad()
        logits = policy.model(
            input_ids=ids_GL, position_ids=positions, **eight_copies(policy, question)
        ).logits[:, len(question.ids_P) - 1 : -1]
        logits.log_softmax(-1).gather(2, ids_GL[:, len(question.ids_P) :, None]).mean().backward()
        theirs.gradient = policy.text.layers[0].self_attn.q_proj.weight.grad

    fast, slow = alternate(ours, theirs, repeats=1)
    with capsys.disabled():
        print(f"\nscoring: packed {fast:.2f} s, eight copies {slow:.2f} s: {slow / fast:.1f}x")
    assert relative(ours.gradient, theirs.gradient) < 1e-4
    assert slow > 2 * fast


@pytest.mark.slow
def test_rollout_is_at_least_twice_as_fast_as_generate(big, capsys):
    """8 x 64 tokens from one prefill; generate(num_return_sequences=8) encodes it all 8 times."""
    policy, question = big
    video_id = policy.model.config.video_token_id

    def ours():
        features = policy.encode_videos([question])
        groups = policy.rollout([question], features, 8, 64, 1.0, [(0,)])
        assert groups[0].lengths_G.tolist() == [64] * 8

    def theirs():
        ids = question.ids_P[None]
        out = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == video_id).int() * 2,
            pixel_values_videos=question.patches,
            video_grid_thw=torch.tensor([question.grid]),
            num_return_sequences=8,
            do_sample=True,
            max_new_tokens=64,
            min_new_tokens=64,
            top_k=0,
        )
        assert out.shape == (8, len(question.ids_P) + 64)

    with torch.no_grad():
        fast, slow = alternate(ours, theirs, repeats=1)
    with capsys.disabled():
        print(f"\nrollout: prefill once {fast:.2f} s, generate {slow:.2f} s: {slow / fast:.1f}x")
    assert slow > 2 * fast
