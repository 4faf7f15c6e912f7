"""The controls of --token_weights: by hand, in the loss of a step, and refused where they make no
sense."""

import math

import pytest
import torch
from torch.testing import assert_close

import twgrpo
from files import UserError
from kernels import reference
from kernels.reference import LossOptions, group_divergence
from run.config import Config, parse_config

FORMS = ("divergence", "position", "shuffled", "none")


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


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


@pytest.mark.parametrize("form", FORMS)
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


def test_each_form_reaches_the_loss_of_a_step(world, policy, questions):
    """From the flags to the weights of a group: the same completions under each form."""
    outputs = {}
    for form in (*FORMS, "entropy"):
        cfg = Config(str(world / "model"), "-", token_weights=form, max_completion_length=20)
        groups = twgrpo.sample_groups(cfg, policy, questions[:1], [(42, 7, 0, 1)])
        groups[0].advantages_G = torch.linspace(-1, 1, 8)
        outputs[form] = twgrpo.score_groups(cfg, policy, groups)[1][0]
    w = {form: output.weights_T for form, output in outputs.items()}
    assert (w["none"] == 1).all()
    assert_close(w["position"], torch.linspace(1, 1.7, len(w["none"])))
    by_hand = reference.shuffled_weights(w["divergence"], (42, 7, 0, 6))
    assert torch.equal(w["shuffled"], by_hand) and not torch.equal(by_hand, w["divergence"])
    assert torch.equal(outputs["position"].divergence_T, outputs["divergence"].divergence_T)
    H_T = outputs["entropy"].divergence_T
    assert H_T[0] > 0 == outputs["divergence"].divergence_T[0].round(decimals=6)  # one prompt row
    assert_close(w["entropy"], reference.token_weights(H_T, 1.7))


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("entropy --divergence textbook", "entropy ignores --divergence and"),
        ("position --ended_rows exclude", "position ignores --divergence and"),
        ("none --ended_rows exclude", "none ignores --divergence and"),
        ("none --loss_type grpo", "need --loss_type tw_grpo"),
        ("shuffled --loss_type grpo", "need --loss_type tw_grpo"),
        ("divergence --normalize_token_weights true --loss_type grpo", "need --loss_type tw_grpo"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_config(f"--token_weights {flags}".split())
    accepted = "--token_weights shuffled --divergence textbook --ended_rows exclude"
    assert parse_config(accepted.split()).divergence == "textbook"
