"""docs/walkthrough.md: every number on the page, computed from docs/walkthrough.npz by the code
that trains."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from conftest import PROJECT
from doc_checks import blocks, numbers_in, prose, shows, tables
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
RECORD = Record("", str(DATA["problem"]), str(DATA["solution"]), PROJECT)
SECONDS, START = float(DATA["seconds"]), int(IS_VIDEO_P.argmax())
POSITION_N = np.concatenate([np.arange(n) for n in LENGTHS_G])
ROWS = np.split(np.arange(N), LENGTHS_G.cumsum()[:-1])  # of each completion, among the N
TEXTS = ["".join(WORDS_V[k] for k in TARGETS_N[r] if k != DATA["end_token_id"]) for r in ROWS]
UNIFORM_TG = np.random.default_rng(DATA["seed"]).random((20, G))
ALPHA, STEP = 1.7, 0.1  # the largest weight; the size of the page's own step on lm_head
FORK = 4  # the position at which the four completions part


def tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(DATA[name])


def measured_row() -> dict:
    """What the model reads: patches, positions, the packed row."""
    geometry, ids_P = video.Geometry(), tensor("ids_P")
    patches, grid = video.patchify(tensor("frames_F3HW"), geometry)
    told = (SECONDS * geometry.temporal_patch_size, geometry)
    x = video.mrope_positions(ids_P, int(DATA["video_token_id"]), grid, *told)
    question = Question(RECORD, "", ids_P, x, patches, grid, SECONDS)
    completions = [torch.from_numpy(TARGETS_N[rows]) for rows in ROWS]
    row, row_positions, *_ = pack([Group(question, completions, [True] * G, TEXTS)], pad_id=0)
    sizes = [*patches.shape, *grid, row.shape[1], G * (P + T), row_positions[0, 0, P]]
    return dict(positions_3P=x, sizes=sizes)


def measured_loss() -> dict:
    """From the rewards to the gradient, in float64."""
    accuracy, form, binary = (
        torch.tensor([REWARDS[name](t, RECORD.solution) for t in TEXTS]).double()
        for name in ("accuracy", "format", "origin_accuracy")
    )
    advantages_G = twgrpo.group_advantages(accuracy + form)
    hidden_ND, head_VD = tensor("hidden_ND").double(), tensor("head_VD").double().requires_grad_()
    group = (tensor("targets_N"), tensor("lengths_G"), advantages_G)
    official = tw_grpo_head(hidden_ND, head_VD, *group, alpha=ALPHA)
    textbook = tw_grpo_head(hidden_ND, head_VD, *group, alpha=ALPHA, divergence="textbook")
    excluded = tw_grpo_head(hidden_ND, head_VD, *group, ended_rows="exclude")
    unweighted = tw_grpo_head(hidden_ND, head_VD, *group, alpha=1.0)
    official.loss.backward()
    # With the identity for lm_head, hidden states are logits, and so are their gradients.
    logits_NV = (hidden_ND @ head_VD.detach().T).requires_grad_()
    tw_grpo_head(logits_NV, torch.eye(V).double(), *group, alpha=ALPHA).loss.backward()
    completion_N, position_N = reference.positions_of_tokens(group[1])
    uniform_N = torch.from_numpy(UNIFORM_TG)[position_N, completion_N]
    assert torch.equal(sample(logits_NV, 1.0, uniform_N, tensor("banned_V"))[0], group[0])
    at = (completion_N, position_N, group[1])
    share_N = reference.token_coefficients(*at, official.weights_T, "tw_grpo")
    return dict(
        rewards=torch.stack([accuracy, form]),
        advantages=torch.stack([advantages_G, twgrpo.group_advantages(binary + form)]),
        p=reference.vocab_logps(hidden_ND, head_VD).exp(),
        D=torch.stack([official.divergence_T, textbook.divergence_T, excluded.divergence_T]),
        w=torch.stack([official.weights_T, textbook.weights_T]),
        c=-share_N * advantages_G[completion_N],
        losses=torch.stack([x.loss for x in (official, textbook, unweighted)]),
        g=logits_NV.grad,
        after=reference.vocab_logps(hidden_ND, head_VD - STEP * head_VD.grad).exp(),
    )


@pytest.fixture(scope="module")
def v() -> dict[str, np.ndarray]:
    values = measured_row() | measured_loss()
    return {name: torch.as_tensor(value).detach().numpy() for name, value in values.items()}


# ------------------------------------------------------------------------------- what the page says


def token(k: int) -> str:
    return "end" if k == DATA["end_token_id"] else f"`{WORDS_V[k]}`"


def values_of_the_tables(v) -> list[list[list]]:
    """The numbers, tokens and completions of each table, row by row."""
    x, p, c, names = v["positions_3P"], v["p"], v["c"], [f"c{i + 1}" for i in range(G)]
    edges = [START, START + 4, START + 8, P]
    spans = [[0, START - 1, *x[:, [0, START - 1]].ravel()]]
    spans += [[a, b - 1, *x[:, a:b].ravel()] for a, b in itertools.pairwise(edges[:3])]
    spans += [[START + 8, P - 1, *x[:, [START + 8, P - 1]].ravel()]]

    fork, draws = [r[FORK] for r in ROWS], []
    for name, n, u in zip(names, fork, UNIFORM_TG[FORK], strict=True):
        mass, k = np.where(DATA["banned_V"], 0, p[n]).cumsum(), TARGETS_N[n]
        draws.append([name, u, token(k), *(mass[k - 1 : k + 1] / mass[-1]), np.log(p[n, k])])

    texts = [f"`{text}`" for text in TEXTS]
    rewards = list(zip(names, texts, LENGTHS_G, *v["rewards"], *v["advantages"], strict=True))

    weights, coefficients = [], {}
    for t in range(T):
        alive = [r[t] for r in ROWS if t < len(r)]
        D_w = [v["D"][0, t], v["w"][0, t], v["D"][1, t], v["w"][1, t]]
        weights.append([t, *(token(TARGETS_N[n]) for n in alive), len(alive), *D_w])
        coefficients[t] = [*c[alive], c[alive].sum()]
    places = [[0, 4, *coefficients[0]], *([t, *coefficients[t]] for t in range(13, T))]

    branches = []
    for k in p[fork[0]].argsort()[::-1][:4]:
        takers = [name for name, n in zip(names, fork, strict=True) if TARGETS_N[n] == k]
        numbers = [p[fork[0], k], v["g"][fork, k].sum(), v["after"][fork[0], k]]
        branches.append([token(k), *(takers or ["none"]), *numbers])

    own = []
    for i, t in ((3, FORK), (1, FORK), (2, 5), (1, 15)):
        n, k = ROWS[i][t], TARGETS_N[ROWS[i][t]]
        product = 1e6 * c[n] * (1 - p[n, k])
        own.append([token(k), names[i], t, v["w"][0, t], c[n], p[n, k], product])
    return [spans, draws, rewards, weights, places, branches, own]


def values_of_the_prose(v) -> list[float]:
    """What the page says outside its tables, beside what these show."""
    p, D_T, step, live = v["p"], v["D"], 4 * SECONDS, min(LENGTHS_G)
    # c2 at t = 15, alone: its log-probs, how far the mean is above them, what a token adds to D.
    last = ROWS[1][15]
    alone, uniform = np.log(p[last]), -np.log(V)
    mean = (alone + 3 * uniform) / 4
    d = np.stack([mean - alone, *[mean - uniform] * 3]).clip(-11, 11)
    part = (np.exp(d) - d - 1).mean(0)
    own = np.abs(v["g"][np.arange(N), TARGETS_N])
    own *= 100 / own.sum()  # in percent
    early, late = own[(POSITION_N >= 3) & (POSITION_N <= 5)].sum(), own[POSITION_N >= 15].sum()
    sums, frames = v["rewards"].sum(0), toy.CLIP["max_frames"]
    constants = [ALPHA, STEP, 1e6, 14, 2, 28, 7, 32, 64, 1.5, 0.5, toy.FRAMES, toy.RATE]
    sizes = [V, D, G, N, P, *v["sizes"], IS_VIDEO_P.sum(), *DATA["frames_F3HW"].shape]
    times = [SECONDS, 2 * SECONDS, step, int(step), START + int(step)]
    settings = video.ClipSettings(max_frames=frames)
    times += video.frame_indices(toy.FRAMES, toy.RATE, settings)
    loss = [sums.mean(), sums.std(ddof=1), *v["losses"], early, late]
    above, most = np.median(mean - alone), D_T[0, :live].max()
    spread = [np.log(G), np.median(alone), uniform, above, np.median(part), D_T[0, 15] / most]
    return [*constants, *sizes, *times, *loss, *spread, part[TARGETS_N[last]]]


def test_the_page_shows_what_they_give(v):
    """Every number, token and completion of the tables in its place; of the prose, each number is
    one of those measured."""
    values = values_of_the_prose(v)
    for table, expected in zip(tables(PAGE), values_of_the_tables(v), strict=True):
        for row, wanted in zip(table.rows, expected, strict=True):
            found = re.findall(r"`.*?`|end|none|\bc\d|-?\d[\d.,]*(?<!,)", " | ".join(row))
            for word, x in zip(found, wanted, strict=True):
                assert word == x if isinstance(x, str) else shows(word, x), (row, x)
        values += [x for wanted in expected for x in wanted if not isinstance(x, str)]
    text = re.sub(
        r"^[|>].*$|<!--.*?-->|eqs?\. [\d, to and]+|\bc[1-4]\b", "", prose(PAGE), flags=re.M
    )
    origin = json.loads(str(DATA["origin"]))
    assert f"collected on {origin['date']} at commit {origin['commit']}" in " ".join(text.split())
    text = text.replace(origin["date"], "").replace(origin["commit"], "")
    for number in numbers_in(text):
        assert any(shows(number, x) for x in values), number


def test_the_prompt_and_the_picture_are_those_of_the_data():
    """The prompt as the page shows it, with one placeholder for all video tokens."""
    prompt = "".join(WORDS_V[np.delete(DATA["ids_P"], np.flatnonzero(IS_VIDEO_P)[1:])])
    assert prompt in blocks(PAGE, "text") and question_text(RECORD) in prompt
    assert f"The right answer is `{RECORD.solution[8:-9]}`" in PAGE
    shown = np.asarray(Image.open(PROJECT / "docs" / "walkthrough.png"))
    assert (shown == np.asarray(walkthrough.picture(DATA["frames_F3HW"]))).all()


def test_the_script_writes_both_files_for_any_toy(tmp_path, monkeypatch):
    """On a toy of two clips with an untrained model."""
    pytest.importorskip("av")
    world = tmp_path / "run" / "toy"
    records = load_records(toy.write_clips(world, seed=0, train=2, test=1)[0], world)
    tokenizer = toy.toy_tokenizer(records, seed=0)
    Policy(toy.build_model(tokenizer), tokenizer, toy.CHAT_TEMPLATE).save(world / "model")

    monkeypatch.setattr("sys.argv", ["walkthrough", str(world.parent), "--out", str(tmp_path)])
    monkeypatch.setattr(walkthrough, "QUESTION", "train-1")
    walkthrough.main()
    data = dict(np.load(tmp_path / "walkthrough.npz"))
    assert data.keys() == DATA.keys() and data["problem"] == records[1].problem
    assert len(data["hidden_ND"]) == len(data["targets_N"]) == data["lengths_G"].sum()
    assert Image.open(tmp_path / "walkthrough.png").size == (702, 168)
