"""Speed and memory of the head beside the matmuls it cannot avoid and the alternatives installed.

    python -m benchmarks.gpu --part kernels --out runs/h200

Groups of G = 8 equally long completions, bf16, on-policy, forward and backward with D_t and w_t.
The ceiling is three bare cuBLAS products of the same shape: H Wᵀ, its gradient times W, times H.
Without CUDA it says so and measures nothing.
"""

import functools
import statistics
from collections.abc import Callable
from importlib.util import find_spec

import torch

from benchmarks.origin import Results
from kernels import reference, tw_grpo_head

G = 8
SHAPES = [(N, 3584, 152064) for N in (8192, 1024, 32768)]
# What an alternative leaves out, printed with its numbers.
NOTES = {
    "frozen head": "no gradient of lm_head",
    "60 % full": "lengths from 20 to 100 % of the longest, 60 % of the tokens",
    "compiled reference": "float32 matmuls",
    "Liger": "no group weights",
    "TRL": "log-probs only, no group weights",
    "QuACK": "cross-entropy only, no advantages",
    "CCE": "cross-entropy only; leaves out small gradients",
}
COLUMNS = dict(
    impl="", N="", D="", V="", forward_ms=".1f", backward_ms=".1f", total_ms=".1f", spread_ms=".1f",
    tflops=".0f", peak_mb=".0f", forward_ratio=".2f", ratio=".2f", note="",
)  # fmt: skip


def make_group(N: int, D: int, V: int, device, dtype, lengths=None, frozen=False) -> dict:
    """A group of N tokens in G completions of equal or the given lengths."""
    torch.manual_seed(0)
    lengths = lengths or [N // G] * G
    group = dict(
        hidden_ND=torch.randn(sum(lengths), D, device=device, dtype=dtype, requires_grad=True),
        # Logits with a standard deviation of about 3, as a trained head's.
        weight_VD=(torch.randn(V, D, device=device, dtype=dtype) * 3 / D**0.5).requires_grad_(),
        targets_N=torch.randint(V, (sum(lengths),), device=device),
        lengths_G=torch.tensor(lengths, device=device),
        advantages_G=torch.linspace(-1, 1, len(lengths), device=device),
    )
    group["weight_VD"].requires_grad_(not frozen)
    return group


def official(hidden_ND, weight_VD, targets_N, lengths_G, advantages_G, alpha=1.7):
    """The official computation restated: padded G x T rows, all logits at once, in bf16.

    Source: official aa529ff grpo_trainer.py, compute_loss. Like it, w_t is not detached.
    """
    completion_N, position_N = reference.positions_of_tokens(lengths_G)
    logps_NV = (hidden_ND @ weight_VD.T).log_softmax(-1)
    logps_N = logps_NV.gather(1, targets_N[:, None])[:, 0]
    rows_GTV = logps_NV.new_zeros(len(lengths_G), int(lengths_G.max()), logps_NV.shape[1])
    rows_GTV = rows_GTV.index_put((completion_N, position_N), logps_NV)
    weights_T = reference.token_weights(reference.group_divergence(rows_GTV, lengths_G), alpha)
    gain_N = (logps_N - logps_N.detach()).exp() * advantages_G[completion_N]
    return -(weights_T[position_N] * gain_N).mean()


def ours(impl: str) -> Callable:
    return lambda **group: lambda: tw_grpo_head(**group, impl=impl).loss


def liger(hidden_ND, weight_VD, targets_N, lengths_G, advantages_G):
    """liger-kernel 0.8.5."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    shape = len(lengths_G), int(lengths_G[0])
    options = dict(beta=0.0, epsilon_high=0.28, loss_type="bnpo", use_ref_model=False)
    head, mask = LigerFusedLinearGRPOLoss(**options), hidden_ND.new_ones(shape).float()
    hidden_GTD, targets_GT = hidden_ND.view(*shape, -1), targets_N.view(shape)
    return lambda: head(hidden_GTD, weight_VD, targets_GT, mask, advantages_G)[0]


def trl(hidden_ND, weight_VD, targets_N, lengths_G, advantages_G):
    """trl 1.16."""
    from trl.kernels import ChunkedLogProbFunction

    advantages_N = advantages_G.repeat_interleave(lengths_G)
    arguments = hidden_ND, weight_VD, None, targets_N, 1.0, 8192, None, 1.0, ()

    def forward():
        logps_N = ChunkedLogProbFunction.apply(*arguments)[0]
        return -((logps_N - logps_N.detach()).exp() * advantages_N).mean()

    return forward


def quack(hidden_ND, weight_VD, targets_N, **_):
    """quack-kernels 0.6.5."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return functools.partial(chunked_linear_cross_entropy, hidden_ND, weight_VD, targets_N)


def cce(hidden_ND, weight_VD, targets_N, **_):
    """cut-cross-entropy 25.1.1."""
    from cut_cross_entropy import linear_cross_entropy

    return functools.partial(linear_cross_entropy, hidden_ND, weight_VD, targets_N)


def variants() -> dict[str, Callable]:
    """{name: function of a group that returns the forward to time} of everything that can run."""
    plain = torch.compile(lambda **group: tw_grpo_head(**group, impl="reference").loss)
    found = {
        "chunked": ours("chunked"),
        "fused": ours("fused"),
        "official": lambda **group: functools.partial(official, **group),
        "compiled reference": lambda **group: functools.partial(plain, **group),
    }
    for name, package, prepare in (
        ("Liger", "liger_kernel", liger),
        ("TRL", "trl", trl),
        ("QuACK", "quack", quack),
        ("CCE", "cut_cross_entropy", cce),
    ):
        if find_spec(package):
            found[name] = prepare
        else:
            print(f"left out, not installed: {name} ({package})")
    return found


def milliseconds(work: list[Callable], repeats: int = 7) -> list[tuple[float, float]]:
    """(median, spread) of each function in the list `work`, run one after another."""
    work_times = [[] for _ in work]
    for repeat in range(repeats + 2):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(work) + 1)]
        events[0].record()
        for function, event in zip(work, events[1:], strict=True):
            function()
            event.record()
        torch.cuda.synchronize()
        if repeat >= 2:  # the first two compile, load and allocate
            for times, a, b in zip(work_times, events, events[1:], strict=False):
                times.append(a.elapsed_time(b))
    return [(statistics.median(t), max(t) - min(t)) for t in work_times]


def bare_matmuls(N: int, D: int, V: int) -> dict:
    """The row of the three bare products: the ceiling."""
    hidden, weight = (torch.randn(n, D, device="cuda", dtype=torch.bfloat16) for n in (N, V))
    logits = hidden @ weight.T
    products = [
        lambda: torch.mm(hidden, weight.T, out=logits),
        lambda: logits @ weight,
        lambda: logits.T @ hidden,
    ]
    times = [median for median, _ in milliseconds(products)]
    total = sum(times)
    return dict(forward_ms=times[0], total_ms=total, tflops=6 * N * D * V / total / 1e9, ratio=1.0)


def measure(prepare: Callable, ceiling: dict, N: int, D: int, V: int, **options) -> dict:
    """What the row of a variant holds. "peak_mb" is memory beyond the inputs and the gradients.

    ceiling  what `bare_matmuls` measured;  options  of `make_group`
    """
    group = make_group(N, D, V, "cuda", torch.bfloat16, **options)
    leaves = [group[k] for k in ("hidden_ND", "weight_VD") if group[k].requires_grad]
    run, kept = prepare(**group), {}

    def forward():
        for leaf in leaves:
            leaf.grad = None
        kept["loss"] = run()

    def backward():
        kept.pop("loss").backward()

    (forward_ms, forward_spread), (backward_ms, spread) = milliseconds([forward, backward])
    for leaf in leaves:
        leaf.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward()
    backward()
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    total = forward_ms + backward_ms
    return dict(
        forward_ms=forward_ms,
        backward_ms=backward_ms,
        total_ms=total,
        spread_ms=forward_spread + spread,
        tflops=6 * len(group["hidden_ND"]) * D * V / total / 1e9,
        peak_mb=(torch.cuda.max_memory_allocated() - before - gradients) / 1e6,
        forward_ratio=forward_ms / ceiling["forward_ms"],
        ratio=total / ceiling["total_ms"],
    )


def run(shapes: list[tuple[int, int, int]], results: Results) -> None:
    """Every variant at every shape, and the frozen and the ragged head at N = 8,192; our own at all
    shapes first."""
    if not torch.cuda.is_available():
        return print("left out: No CUDA device; the head is measured on a GPU only")
    found = variants()
    mine = {name: found.pop(name) for name in ("chunked", "fused")}
    for these in (mine, found):
        for N, D, V in shapes:
            shape = dict(N=N, D=D, V=V)
            bare = functools.partial(bare_matmuls, **shape)
            ceiling = results.measure(bare, impl="3 bare matmuls", **shape)
            if not ceiling or "failed" in ceiling:
                continue
            cases = [(name, prepare, {}) for name, prepare in these.items()]
            if these is mine and N == 8192:
                ragged = [int(N // G * (0.2 + 0.8 * i / (G - 1))) for i in range(G)]
                cases.append(("chunked, frozen head", mine["chunked"], dict(frozen=True)))
                cases.append(("chunked, 60 % full", mine["chunked"], dict(lengths=ragged)))
            for name, prepare, options in cases:
                work = functools.partial(measure, prepare, ceiling, **shape, **options)
                note = NOTES.get(name.removeprefix("chunked, "), "")
                results.measure(work, impl=name, **shape, note=note)
                torch.cuda.empty_cache()
