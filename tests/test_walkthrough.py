"""docs/walkthrough.md: every number on the page, computed from docs/walkthrough.npz by the code
that trains."""

import json
import re
from functools import cache

import numpy as np
import pytest
import torch
from doc_checks import PROJECT, blocks, numbers_in, prose, shown_as, tables
from PIL import Image

import toy
import twgrpo
import video
from benchmarks import walkthrough
from data import Question, question_text
from kernels import reference, tw_grpo_head
from model.packing import Group, pack
from model.policy import Policy
from model.rollout import sample
from records import Record, load_records
from rewards import REWARDS

PAGE = (PROJECT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
DATA = dict(np.load(PROJECT / "docs" / "walkthrough.npz"))
WORDS_V, TARGETS_N, LENGTHS_G = DATA["words_V"], DATA["targets_N"], DATA["lengths_G"]
(N, D), V, G, T = DATA["hidden_ND"].shape, len(WORDS_V), len(LENGTHS_G), max(LENGTHS_G)
P, IS_VIDEO_P = len(DATA["ids_P"]), DATA["ids_P"] == DATA["video_token_id"]
COMPLETION_N = np.repeat(np.arange(G), LENGTHS_G)
POSITION_N = np.concatenate([np.arange(n) for n in LENGTHS_G])
ROW = {(i, t): n for n, (i, t) in enumerate(zip(COMPLETION_N, POSITION_N, strict=True))}
COMPLETIONS = [TARGETS_N[COMPLETION_N == i] for i in range(G)]
TEXTS = ["".join(WORDS_V[k] for k in c if k != DATA["end_token_id"]) for c in COMPLETIONS]
UNIFORM_N = np.random.default_rng(DATA["seed"]).random((20, G))[POSITION_N, COMPLETION_N]
ALPHA, STEP = 1.7, 0.1  # the largest weight; the size of the page's own step on lm_head
FORK = 4  # the position at which the four completions part


def tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(DATA[name])


@cache
def computed() -> dict[str, np.ndarray]:
    geometry, seconds, ids_P = video.Geometry(), float(DATA["seconds"]), tensor("ids_P")
    patches, grid = video.patchify(tensor("frames_F3HW"), geometry)
    positions_3P = video.mrope_positions(
        ids_P, int(DATA["video_token_id"]), grid, seconds * geometry.temporal_patch_size, geometry
    )
    record = Record("", str(DATA["problem"]), str(DATA["solution"]), PROJECT)
    question = Question(record, "", ids_P, positions_3P, patches, grid, seconds)
    group = Group(question, [torch.from_numpy(c) for c in COMPLETIONS], [True] * G, TEXTS)
    row_ids, row_positions, _, _ = pack([group], pad_id=0)

    rewards = {
        name: torch.tensor([REWARDS[name](t, record.solution) for t in TEXTS]).double()
        for name in ("accuracy", "format", "origin_accuracy")
    }
    advantages_G = twgrpo.group_advantages(rewards["accuracy"] + rewards["format"])
    hidden_ND, head_VD = tensor("hidden_ND").double(), tensor("head_VD").double().requires_grad_()
    lengths_G = tensor("lengths_G")

    def head(hidden_ND=hidden_ND, head_VD=head_VD, alpha=ALPHA, **options):
        group = (tensor("targets_N"), lengths_G, advantages_G)
        return tw_grpo_head(hidden_ND, head_VD, *group, alpha=alpha, **options)

    official, textbook = head(), head(divergence="textbook")
    official.loss.backward()
    logits_NV = (hidden_ND @ head_VD.detach().T).requires_grad_()
    # With the identity for lm_head, hidden states are logits, and so are their gradients.
    head(logits_NV, torch.eye(V).double()).loss.backward()
    tokens = reference.positions_of_tokens(lengths_G)
    share_N = reference.token_coefficients(*tokens, lengths_G, official.weights_T, "tw_grpo")
    p_after_NV = reference.vocab_logps(hidden_ND, head_VD - STEP * head_VD.grad).exp()
    values = rewards | {
        "frames": video.frame_indices(toy.FRAMES, toy.RATE, video.FPS, toy.CLIP["max_frames"]),
        "patches": patches.shape,
        "grid": grid,
        "positions_3P": positions_3P,
        "tokens": sample(logits_NV, 1.0, torch.from_numpy(UNIFORM_N), tensor("banned_V"))[0],
        "binary": twgrpo.group_advantages(rewards["origin_accuracy"] + rewards["format"]),
        "A": advantages_G,
        "row": row_ids.shape[1],
        "start": row_positions[0, 0, P],
        "p": reference.vocab_logps(hidden_ND, head_VD).exp(),
        "D": official.divergence_T,
        "w": official.weights_T,
        "D textbook": textbook.divergence_T,
        "w textbook": textbook.weights_T,
        "D excluded": head(ended_rows="exclude").divergence_T,
        "c": -share_N * advantages_G[torch.from_numpy(COMPLETION_N)],
        "losses": [x.loss.detach() for x in (official, textbook, head(alpha=1.0))],
        "g": logits_NV.grad,
        "p after": p_after_NV,
    }
    assert (values["tokens"] == torch.from_numpy(TARGETS_N)).all()  # the draws that were made
    return {name: torch.as_tensor(value).detach().numpy() for name, value in values.items()}


def test_the_kernels_give_the_numbers_of_the_page():
    """In float32, by Triton: on a GPU if there is one, else by its interpreter."""
    pytest.importorskip("triton")
    device, v = "cuda" if torch.cuda.is_available() else "cpu", computed()
    hidden_ND, head_VD = (tensor(k).to(device).requires_grad_() for k in ("hidden_ND", "head_VD"))
    group = (tensor("targets_N"), tensor("lengths_G"), torch.from_numpy(v["A"]).float())
    out = tw_grpo_head(hidden_ND, head_VD, *(x.to(device) for x in group), impl="chunked")
    out.loss.backward()
    for got, plain in (
        (out.loss, v["losses"][0]),
        (out.divergence_T, v["D"]),
        (out.weights_T, v["w"]),
        (head_VD.grad, v["g"].T @ DATA["hidden_ND"]),
        (hidden_ND.grad, v["g"] @ DATA["head_VD"]),
    ):
        np.testing.assert_allclose(got.detach().cpu(), plain, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------- what the page says


def token(k: int) -> str:
    return "end" if k == DATA["end_token_id"] else f"`{WORDS_V[k]}`"


def signed(x: float, places: int) -> str:
    return f"{x:.{places}f}".replace(f"-{0:.{places}f}", f"{0:.{places}f}")


@cache
def expected_tables() -> list[list[list[str]]]:
    """The rows of the page's tables, in its order."""
    v, names = computed(), [f"c{i + 1}" for i in range(G)]
    start, x = IS_VIDEO_P.argmax(), v["positions_3P"]
    fork = [ROW[i, FORK] for i in range(G)]

    def span(first: int, last: int, where: str) -> list[str]:
        return [
            f"{first} to {last}, {where}",
            *(f"{x[a, first]} to {x[a, last]}" for a in range(3)),
        ]

    def frames(first: int, which: str) -> list[str]:
        axes = [" ".join(map(str, x[a, first : first + 4])) for a in range(3)]
        return [f"{first} to {first + 3}, {which} two frames", *axes]

    def draw(i: int) -> list[str]:
        share = np.where(DATA["banned_V"], 0, v["p"][fork[i]])
        k, mass = TARGETS_N[fork[i]], share.cumsum() / share.sum()
        interval = f"{mass[k - 1]:.4f} to {mass[k]:.4f}"
        log_p = f"{np.log(v['p'][fork[i], k]):.3f}"
        return [names[i], f"{UNIFORM_N[fork[i]]:.4f}", token(k), interval, log_p]

    def reward(i: int) -> list[str]:
        parts = [f"{v['accuracy'][i]:.1f}", f"{v['format'][i]:.0f}"]
        advantages = [f"{v[k][i]:.3f}" for k in ("A", "binary")]
        return [names[i], f"`{TEXTS[i]}`", str(LENGTHS_G[i]), *parts, *advantages]

    def each(t: int, show) -> list[str]:
        return [show(ROW[i, t]) if t < LENGTHS_G[i] else "-" for i in range(G)]

    def weight(t: int) -> list[str]:
        others = [signed(v[k][t], 4) for k in ("w", "D textbook", "w textbook")]
        said = each(t, lambda n: token(TARGETS_N[n]))
        return [str(t), *said, str(sum(LENGTHS_G > t)), f"{v['D'][t]:,.0f}", *others]

    def coefficient(t: int) -> list[str]:
        total = signed(v["c"][POSITION_N == t].sum(), 5)
        return [str(t), *each(t, lambda n: f"{v['c'][n]:.5f}"), total]

    def branch(k: int) -> list[str]:
        takers = ", ".join(names[i] for i in range(G) if TARGETS_N[fork[i]] == k)
        gradient = signed(v["g"][fork, k].sum(), 5)
        p, after = (f"{v[name][fork[0], k]:.3f}" for name in ("p", "p after"))
        return [token(k), takers or "none", p, gradient, after]

    def own_logit(i: int, t: int) -> list[str]:
        n = ROW[i, t]
        p, c = v["p"][n, TARGETS_N[n]], v["c"][n]
        numbers = [f"{v['w'][t]:.4f}", f"{c:.5f}", f"{p:.6f}", f"{1e6 * c * (1 - p):,.2f}"]
        return [token(TARGETS_N[n]), names[i], str(t), *numbers]

    assert all(coefficient(t)[1:] == coefficient(0)[1:] for t in range(5))
    return [
        [
            span(0, start - 1, "before the clip"),
            frames(start, "first"),
            frames(start + 4, "last"),
            span(start + 8, P - 1, "after the clip"),
        ],
        [draw(i) for i in range(G)],
        [reward(i) for i in range(G)],
        [weight(t) for t in range(T)],
        [["0 to 4", *coefficient(0)[1:]], *(coefficient(t) for t in range(13, T))],
        [branch(k) for k in v["p"][fork[0]].argsort()[::-1][:4]],
        [own_logit(*place) for place in ((3, FORK), (1, FORK), (2, 5), (1, 15))],
    ]


def values_of_the_prose() -> list[float]:
    """What the page says outside its tables, and whatever its tables show."""
    v, seconds = computed(), float(DATA["seconds"])
    start, step = int(IS_VIDEO_P.argmax()), int(4 * seconds)
    rewards, live = v["accuracy"] + v["format"], min(LENGTHS_G)
    # c2 at t = 15, alone: its log-probs, how far the mean is above them, what a token adds to D.
    alone, uniform = np.log(v["p"][ROW[1, 15]]), -np.log(V)
    above = (alone + 3 * uniform) / 4 - alone
    d = np.stack([above] + [(alone + 3 * uniform) / 4 - uniform] * 3).clip(-11, 11)
    part = (np.exp(d) - d - 1).mean(0)
    own = np.abs(v["g"][np.arange(N), TARGETS_N])
    early, late = own[(POSITION_N >= 3) & (POSITION_N <= 5)].sum(), own[POSITION_N >= 15].sum()
    # What the page says without a number of its own.
    assert part.sum() == pytest.approx(v["D"][15]) and np.abs(v["c"]).argmax() == ROW[1, 15]
    assert v["D textbook"].argmax() == 10 and [t for t in range(T) if v["w"][t] > 1.01] == [15, 16]
    assert all(v["p"][ROW[i, 10], COMPLETIONS[i][10]] > 0.99 for i in range(G))
    assert len({c[10] for c in COMPLETIONS}) == G and (v["D excluded"][15:] == 0).all()
    page_itself = [FORK, FORK + 1, *range(T), ALPHA, STEP, 1e6, 14, 2, 28, 7, 32, 64]
    return [
        *page_itself, V, D, G, N, P, start, step, start + step, seconds, 2 * seconds, 4 * seconds,
        toy.FRAMES, toy.RATE, *v["frames"], *v["patches"], *v["grid"], IS_VIDEO_P.sum(),
        *DATA["frames_F3HW"].shape, rewards.mean(), rewards.std(ddof=1), v["row"], G * (P + T),
        v["start"], v["w"][:live].max(), np.log(G), np.median(alone), uniform, np.median(above),
        np.median(part), part[TARGETS_N[ROW[1, 15]]], v["D"][15] / v["D"][:live].max(),
        v["D"][15], v["D textbook"][15], *v["losses"], early / own.sum(), late / own.sum(),
        *v["p"][ROW[0, FORK]], *v["p after"][ROW[0, FORK]], 1.0, 0.0, 1.5, 0.5,
    ]  # fmt: skip


def test_the_page_shows_what_they_give():
    for table, expected in zip(tables(PAGE), expected_tables(), strict=True):
        assert table.rows == expected
    text = re.sub(
        r"^[|>].*$|<!--.*?-->|eqs?\. [\d, to and]+|\bc[1-4]\b", "", prose(PAGE), flags=re.M
    )
    origin = json.loads(str(DATA["origin"]))
    assert f"collected on {origin['date']} at commit {origin['commit']}" in " ".join(text.split())
    text = text.replace(origin["date"], "").replace(origin["commit"], "")
    values = values_of_the_prose()
    wrong = [number for number in numbers_in(text) if not shown_as(number, values)]
    assert wrong == []


def test_the_code_quoted_stands_in_the_file_linked_before_it():
    quoted = " ".join(re.findall("^> (.*)$", PAGE, re.MULTILINE))
    files = re.findall(r"\]\(\.\./([\w/]+\.py)\)(.*?)(?=\[`|$)", quoted)
    found = [(file, code) for file, rest in files for code in re.findall("`([^`]+)`", rest)]
    assert len(found) > 8
    for file, code in found:
        source = " ".join((PROJECT / file).read_text(encoding="utf-8").split())
        assert code in source, f"{file} does not hold {code}"


def test_the_prompt_and_the_picture_are_those_of_the_data():
    """The prompt as the page shows it, with one placeholder for all video tokens."""
    record = Record("", str(DATA["problem"]), str(DATA["solution"]), PROJECT)
    prompt = "".join(WORDS_V[np.delete(DATA["ids_P"], np.flatnonzero(IS_VIDEO_P)[1:])])
    assert prompt in blocks(PAGE, "text") and question_text(record) in prompt
    assert f"The right answer is `{record.solution[8:-9]}`" in PAGE
    shown = np.asarray(Image.open(PROJECT / "docs" / "walkthrough.png"))
    assert (shown == np.asarray(walkthrough.picture(DATA["frames_F3HW"]))).all()


# -------------------------------------------------------------------------------------- the script


def test_the_script_writes_both_files_for_any_toy_and_names_what_is_missing(tmp_path, monkeypatch):
    """On a toy of two clips with an untrained model."""
    pytest.importorskip("av")
    world = tmp_path / "run" / "toy"
    records = load_records(toy.write_clips(world, seed=0, train=2, test=1)[0], world)
    tokenizer = toy.toy_tokenizer(records, seed=0)
    Policy(toy.build_model(tokenizer), tokenizer, toy.CHAT_TEMPLATE).save(world / "model")

    monkeypatch.setattr("sys.argv", ["walkthrough", str(world.parent), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="train.jsonl has no question train-170"):
        walkthrough.main()
    monkeypatch.setattr(walkthrough, "QUESTION", "train-1")
    walkthrough.main()
    data = dict(np.load(tmp_path / "walkthrough.npz"))
    assert data.keys() == DATA.keys() and data["problem"] == records[1].problem
    assert len(data["hidden_ND"]) == len(data["targets_N"]) == data["lengths_G"].sum()
    assert Image.open(tmp_path / "walkthrough.png").size == (702, 168)
