"""Groups of completions to test the kernels on, and what a test compares.

Without a GPU conftest.py chooses Triton's interpreter, before anything imports Triton.
"""

import contextlib

import pytest
import torch

from kernels import backward, plain, reference, tw_grpo_head

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def small_cuts():
    """A group of a dozen tokens and 100 words takes several chunks, slices, blocks and tiles."""
    from kernels import fused, logits  # need Triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits, "CHUNK_ELEMENTS", 12 * 97)
        patch.setattr(plain, "CHUNK_ELEMENTS", 12 * 97)
        patch.setattr(logits, "ROW_BLOCK", 64)
        patch.setattr(logits, "GROUP_ELEMENTS", 512)
        patch.setattr(logits, "GRADIENT_BLOCK", 64)
        patch.setattr(backward, "words_of_slice", lambda *_: 80)
        tile = dict(WORDS=32, TOKENS=32, DEPTH=16, num_warps=4, num_stages=2)
        even = lambda hidden_ND: hidden_ND.shape[1] % 16 == 0  # noqa: E731
        patch.setattr(fused, "tile_for", lambda hidden_ND: tile | dict(EVEN_D=even(hidden_ND)))
        yield


def make_group(
    lengths, V=97, D=20, scale=2.0, offset=0.0, seed=0, off_policy=False, dtype=torch.float32
):
    """Arguments of `tw_grpo_head` for random completions of these lengths.

    Logits have a standard deviation of `scale` around `offset`; old log-probs, where asked for, lie
    within about 0.5 of the new ones, so that some ratios are clipped.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    N = sum(lengths)
    hidden, weight = draw(N, D) * scale / D**0.5, draw(V, D)
    hidden[:, -1], weight[:, -1] = offset, 1.0
    # Rounded first: the float64 reference and the kernels must read the same numbers.
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    group = dict(
        hidden_ND=hidden,
        weight_VD=weight,
        targets_N=targets,
        lengths_G=torch.tensor(lengths),
        advantages_G=draw(len(lengths)).float(),
    )
    if off_policy:
        logps = reference.token_logps(hidden.double(), weight.double(), targets)
        group["old_logps_N"] = (logps + 0.5 * draw(N)).float()
        group["ref_logps_N"] = (logps + draw(N)).float()
    return {name: value.to(DEVICE) for name, value in group.items()}


def materialised_logps(hidden_ND, weight_VD, temperature=1.0):
    return ((hidden_ND @ weight_VD.T).float() / temperature).log_softmax(-1)


def forward_backward(group, impl, cuts=small_cuts, **options):
    """(HeadOutput, dH, dW) of one forward and backward.

    impl also takes "float64", the reference on float64 copies of the inputs, and "materialised",
    the reference as a trainer would write it: the logits of all tokens in the inputs' own dtype.
    """
    if impl == "materialised":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "vocab_logps", materialised_logps)
            return forward_backward(group, "reference", **options)
    if impl == "float64":
        group = {k: v.double() if v.is_floating_point() else v for k, v in group.items()}
        impl = "reference"
    leaves = {k: group[k].detach().clone().requires_grad_() for k in ("hidden_ND", "weight_VD")}
    with cuts():
        output = tw_grpo_head(**{**group, **leaves}, impl=impl, **options)
        output.loss.backward()
    return output, leaves["hidden_ND"].grad, leaves["weight_VD"].grad


def error(value, exact):
    """Largest error, relative to the largest exact value."""
    return ((value.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()
