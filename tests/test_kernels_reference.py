"""The equations by hand, each small enough to be worked out on paper; then bad input, and the
controls of --token_weights in a step."""

import dataclasses
import math
from unittest import mock

import pytest
import torch
from kernel_cases import make_group
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

import twgrpo
from files import UserError
from kernels import reference, tw_grpo_head
from kernels.reference import LossOptions, group_divergence, token_weights
from run.config import Config, parse_config

TOKEN_WEIGHTS = ("divergence", "position", "shuffled", "none")


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def ones(count):
    return torch.ones(count, dtype=torch.int64)


def test_g_opposite_certainties_are_ln_g_apart():
    for G in (2, 3, 8):
        rows = torch.eye(G, dtype=torch.float64).log()[:, None]
        assert_close(group_divergence(rows, ones(G), "textbook"), float64(math.log(G)))


@pytest.mark.parametrize("a, clamped", [(0.7, 0.7), (20.0, 11.0)])
def test_official_divergence_of_two_coins(a, clamped):
    """Log-odds +2a and -2a: the log-probs of a word are a above and below their mean; clamped to 11
    before they are exponentiated."""
    rows = torch.tensor([[a, -a], [-a, a]], dtype=torch.float64).log_softmax(-1)[:, None]
    by_hand = (math.exp(clamped) - clamped - 1) + (math.exp(-clamped) + clamped - 1)
    assert_close(group_divergence(rows, ones(2)), float64(by_hand))


def test_an_ended_completion_counts_as_the_uniform_distribution():
    peaked = float64(0.7, 0.1, 0.1, 0.1).log()
    rows = torch.stack([torch.stack([peaked, peaked]), torch.stack([peaked, peaked * 0 + 99])])
    lengths = torch.tensor([2, 1])  # the second has ended at t = 1; the 99 is never read
    spread = group_divergence(rows, lengths)
    uniform = torch.full((4,), -math.log(4), dtype=torch.float64)
    at_1 = group_divergence(torch.stack([peaked, uniform])[:, None], ones(2))
    assert_close(spread, torch.cat([float64(0), at_1]))


def test_excluding_ended_rows_leaves_one_live_row_without_spread():
    rows = torch.randn(3, 4, 10, dtype=torch.float64).log_softmax(-1)
    for form in ("official", "textbook"):
        spread = group_divergence(rows, torch.tensor([4, 2, 1]), form, "exclude")
        assert_close(spread[2:], float64(0, 0))
        two_alive = group_divergence(rows[:2, 1:2], ones(2), form)
        assert_close(spread[1:2], two_alive)


def test_weights_run_from_1_to_alpha():
    assert_close(token_weights(float64(2, 4, 3), 1.7), float64(1, 1.7, 1.35))
    assert_close(token_weights(float64(2, 4, 3), 1.0), float64(1, 1, 1))


def test_clip_is_asymmetric_and_acts_on_the_worse_side_only():
    ratio = float64(0.5, 0.9, 1.2, 1.5).log()
    gain, clipped = reference.clipped_objective(ratio, 0 * ratio, float64(1, 1, 1, 1), 0.2, 0.28)
    assert_close(gain, float64(0.5, 0.9, 1.2, 1.28))
    assert clipped.tolist() == [False, False, False, True]
    loss, clipped = reference.clipped_objective(ratio, 0 * ratio, -float64(1, 1, 1, 1), 0.2, 0.28)
    assert_close(loss, float64(-0.8, -0.9, -1.2, -1.5))
    assert clipped.tolist() == [True, False, False, False]


def test_k3_is_zero_at_equality_and_clamped_far_away():
    k3 = reference.k3_kl(float64(-1, -1, -50), float64(-1, -1 + math.log(2), 0))
    assert_close(k3, float64(0, 1 - math.log(2), math.exp(11) - 12))


@pytest.mark.parametrize("loss_type", ["tw_grpo", "grpo"])
def test_coefficients_are_the_derivative_of_the_loss(loss_type):
    """Eq. 24 as the page has it; ratios on both sides of the clip, one KL beyond its clamp.

    The share of a token is that of a mean over tokens, or over completions (eqs. 18, 19).
    """
    lengths, A = torch.tensor([3, 1, 2]), float64(1.0, -0.6, -0.4)
    logps = torch.linspace(-4, -1, 6, dtype=torch.float64).requires_grad_()
    old = logps.detach() - float64(0.5, 0.1, -0.3, 0.5, -0.5, 0.1)
    ref = logps.detach() + float64(30, 1, -1, 0.2, 0, -2)
    D = float64(0, 2, 1)
    options = LossOptions(alpha=1.5, beta=0.3, loss_type=loss_type)
    output = reference.weighted_loss(logps, D, lengths, A, old, ref, options)
    output.loss.backward()

    rho, d, A_N = (logps - old).exp(), ref - logps, A[torch.tensor([0, 0, 0, 1, 2, 2])]
    is_clipped = torch.tensor([1, 0, 0, 0, 1, 0])
    w_over_N = float64(1, 1.5, 1.25, 1, 1, 1.5) / 6
    share = w_over_N if loss_type == "tw_grpo" else 1 / (3 * float64(3, 3, 3, 1, 2, 2))
    by_hand = share * (-rho * A_N * (1 - is_clipped) - 0.3 * d.expm1() * (d.abs() <= 11))
    assert_close(logps.grad, by_hand.detach(), rtol=1e-6, atol=1e-9)
    assert output.clip_ratio == is_clipped.float().mean()
    assert_close(output.kl, reference.k3_kl(logps, ref).mean().detach())


def test_the_entropy_is_a_mean_over_alive_rows():
    """Sure of one word: 0; a coin: ln 2; four words alike: ln 4. The third row ends early."""
    p_GTV = float64([[1, 0, 0, 0]] * 2, [[0.5, 0.5, 0, 0]] * 2, [[0.25] * 4] * 2)
    for ended_rows in ("uniform", "exclude"):
        H_T = group_divergence(p_GTV.log(), torch.tensor([2, 2, 1]), "entropy", ended_rows)
        assert_close(H_T, float64(math.log(2), math.log(2) / 2))


def test_position_weights_rise_evenly():
    assert_close(reference.position_weights(float64(5, 0, 9), 1.7), float64(1, 1.35, 1.7))
    assert_close(reference.position_weights(float64(5), 1.7), float64(1))


def test_shuffled_weights_are_the_same_at_other_positions():
    weights_T = torch.linspace(1, 1.7, 50)
    one, again, other = (reference.shuffled_weights(weights_T, (42, k, 0)) for k in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert not torch.equal(one, weights_T) and torch.equal(one.sort().values, weights_T)


@pytest.mark.parametrize("form", TOKEN_WEIGHTS)
def test_normalized_weights_have_mean_1_over_the_tokens(form):
    lengths_G = torch.tensor([3, 1, 5])
    _, position_N = reference.positions_of_tokens(lengths_G)
    group = (torch.zeros(9), torch.rand(5), lengths_G, torch.ones(3), None, None)
    plain, normalized = (
        reference.weighted_loss(*group, LossOptions(token_weights=form, normalize_token_weights=n))
        for n in (False, True)
    )
    assert_close(normalized.weights_T[position_N].mean(), torch.tensor(1.0))
    scale = plain.weights_T[position_N].mean()  # the allocation stays
    assert_close(normalized.weights_T * scale, plain.weights_T)
    assert (scale == 1) == (form == "none")
    assert_close(normalized.loss, plain.loss / scale)


def small_group(lengths=(4, 2, 3)):
    group = make_group(lengths, V=11, D=5, dtype=torch.float64)
    group = {name: value.cpu() for name, value in group.items()}
    leaves = {name: group[name].requires_grad_() for name in ("hidden_ND", "weight_VD")}
    A_G = group["advantages_G"].double()
    return group | leaves | dict(advantages_G=A_G - A_G.mean())


def gradients(group, **options):
    output = tw_grpo_head(**group, impl="reference", **options)
    return torch.autograd.grad(output.loss, [group["hidden_ND"], group["weight_VD"]])


def test_official_undetached_weights_change_the_gradient_of_a_ragged_group():
    # PAPER: silent.  OFFICIAL: w_t is not detached.  OURS: detached.
    for lengths in ((3, 3, 3), (4, 2, 3)):
        group = small_group(lengths)
        hidden_ND, weight_VD, targets_N, lengths_G, advantages_G = group.values()
        logps_NV = reference.vocab_logps(hidden_ND, weight_VD)
        logps_GTV = pad_sequence(logps_NV.split(lengths), batch_first=True)
        loss = reference.weighted_loss(
            logps_NV.gather(1, targets_N[:, None])[:, 0],
            group_divergence(logps_GTV, lengths_G),
            *(lengths_G, advantages_G, None, None, LossOptions()),
        ).loss
        official, ours = torch.autograd.grad(loss, hidden_ND)[0], gradients(group)[0]
        difference = (official - ours).norm() / ours.norm()
        # While all are alive, sum_i A_i = 0 and rho = 1: the derivative by w_t vanishes.
        assert difference < 1e-10 if lengths == (3, 3, 3) else difference > 1e-5


def test_alpha_1_is_token_normalised_grpo():
    """On policy, rho = 1, the loss is the mean of -A, its gradient that of the mean of -A log p."""
    group = small_group()
    A_N = group["advantages_G"].repeat_interleave(group["lengths_G"])
    assert_close(tw_grpo_head(**group, alpha=1.0).loss, -A_N.mean())
    logps_N = reference.token_logps(group["hidden_ND"], group["weight_VD"], group["targets_N"])
    expected = torch.autograd.grad(-(A_N * logps_N).mean(), group["hidden_ND"])[0]
    assert_close(gradients(group, alpha=1.0)[0], expected)


def test_temperature_divides_the_logits():
    group = small_group()
    hot = {**group, "hidden_ND": group["hidden_ND"] / 0.7}
    assert_close(tw_grpo_head(**group, temperature=0.7).loss, tw_grpo_head(**hot).loss)


def test_each_form_has_its_weights():
    group, seed, forms = small_group(), (42, 7, 0, 6), (*TOKEN_WEIGHTS, "entropy")
    outputs = [tw_grpo_head(**group, token_weights=form, shuffle_seed=seed) for form in forms]
    w = {form: output.weights_T for form, output in zip(forms, outputs, strict=True)}
    assert (w["none"] == 1).all()
    assert_close(w["position"], torch.linspace(1, 1.7, 4).double())
    assert_close(w["divergence"], token_weights(outputs[0].divergence_T, 1.7))
    assert_close(w["entropy"], token_weights(outputs[-1].divergence_T, 1.7))
    assert torch.equal(w["shuffled"], reference.shuffled_weights(w["divergence"], seed))
    assert len({tuple(x.tolist()) for x in w.values()}) == 5


def test_the_order_of_completions_and_of_words_changes_nothing():
    group, words, rows = small_group((3, 3, 3)), torch.arange(11).flip(0), torch.arange(9).roll(3)
    by_rows = {k: v[rows] if k.endswith(("_ND", "_N")) else v for k, v in group.items()}
    by_words = dict(weight_VD=group["weight_VD"][words], targets_N=10 - group["targets_N"])
    exact = tw_grpo_head(**group)
    for change in (by_rows | dict(advantages_G=group["advantages_G"].roll(1)), by_words):
        output = tw_grpo_head(**group | change)
        assert_close(output.divergence_T, exact.divergence_T)
        assert_close(output.loss, exact.loss)


BAD_INPUT = [
    ("hidden_ND", lambda x: x[0], r"must be float \(N, D\)"),
    ("weight_VD", lambda x: x[:, 1:], r"must be float \(V, D\) with {'N': 9, 'D': 5, 'V': 11}"),
    ("weight_VD", lambda x: x.float(), "must have the same dtype"),
    ("targets_N", lambda x: x.int(), "must be int64"),
    ("targets_N", lambda x: x + 11, "outside the vocabulary of 11"),
    ("targets_N", lambda x: x - 11, "outside the vocabulary of 11"),
    ("lengths_G", lambda x: torch.tensor([4, 2, 2]), "sum to the 9 rows"),
    ("lengths_G", lambda x: torch.tensor([4, 0, 5]), "at least 1 each"),
    ("advantages_G", lambda x: x[1:], r"must be float \(G\)"),
    ("advantages_G", lambda x: x.to("meta"), "is on meta"),
    ("ref_logps_N", lambda _: torch.zeros(9).long(), "must be float"),
    ("alpha", lambda _: 0.0, "at least 1"),
    ("beta", lambda _: 0.1, "needs ref_logps_N"),
    ("beta", lambda _: -0.1, "at least 0"),
    ("temperature", lambda _: 0.0, "at least"),
    ("loss_type", lambda _: "ppo", "must be one of tw_grpo, grpo"),
    ("impl", lambda _: "fast", "must be one of auto, chunked, fused, plain, reference"),
]


@pytest.mark.parametrize("name, value, sentence", BAD_INPUT)
def test_bad_input_is_named(name, value, sentence):
    group = small_group()
    group[name] = value(group.get(name))
    with pytest.raises((ValueError, TypeError, RuntimeError), match=sentence) as caught:
        tw_grpo_head(**group)
    assert name in str(caught.value)


def test_every_flag_of_the_objective_reaches_the_loss(world, policy, questions, monkeypatch):
    flags = dict(alpha=1.3, epsilon=0.1, epsilon_high=0.4, temperature=0.7, divergence="textbook")
    flags |= dict(ended_rows="exclude", token_weights="shuffled", normalize_token_weights=True)
    cfg = Config(str(world / "model"), "-", max_completion_length=6, num_generations=2, **flags)
    groups = twgrpo.sample_groups(cfg, policy, questions[:2], [(42, 7, 0, 1), (42, 7, 1, 1)])
    for group in groups:
        group.advantages_G = torch.tensor([-1.0, 1.0])
    monkeypatch.setattr(twgrpo, "tw_grpo_head", spy := mock.Mock(wraps=tw_grpo_head))
    _, outputs = twgrpo.score_groups(cfg, policy, groups)
    for slot, (call, output) in enumerate(zip(spy.call_args_list, outputs, strict=True)):
        options, expected = call.kwargs, dict(kept_share=0.5, shuffle_seed=(42, 7, slot, 6))
        assert options | flags | expected == options
        assert options.keys() >= {field.name for field in dataclasses.fields(LossOptions)}
        assert output.divergence_T[0].abs() < 1e-6  # all rows are the prompt's last


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("entropy --divergence textbook", "entropy ignores --divergence and"),
        ("none --ended_rows exclude", "none ignores --divergence and"),
        ("shuffled --loss_type grpo", "need --loss_type tw_grpo"),
        ("divergence --normalize_token_weights true --loss_type grpo", "need --loss_type tw_grpo"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_config(f"--token_weights {flags}".split())
    accepted = "--token_weights shuffled --divergence textbook --ended_rows exclude"
    assert parse_config(accepted.split()).divergence == "textbook"
