"""Speed and memory of the head on a GPU, against the matmuls it cannot avoid and alternatives.

    python -m benchmarks.head --json runs/head.json

Groups of G = 8 completions, bf16, on policy, forward and backward with D_t and w_t. `ratio` is to
three bare matmuls of the same shape: H Wᵀ, its gradient times W, its transpose times H.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.origin import Results, medians, table
from kernels import tw_grpo_head
from run.log import phase

G, D, V, DEVICE = 8, 3584, 152064, "cuda"
RAGGED = [int(1024 * (0.2 + 0.8 * i / (G - 1))) for i in range(G)]


def make_group(N: int, lengths: list[int] | None = None, frozen: bool = False) -> dict:
    """A group of N tokens in G completions of equal or the given lengths, in bf16."""
    torch.manual_seed(0)
    lengths, bf16 = lengths or [N // G] * G, dict(device=DEVICE, dtype=torch.bfloat16)
    return dict(
        hidden_ND=torch.randn(sum(lengths), D, **bf16, requires_grad=True),
        # Logits with a standard deviation of about 3, like a trained head's.
        weight_VD=(torch.randn(V, D, **bf16) * 3 / D**0.5).requires_grad_(not frozen),
        targets_N=torch.randint(V, (sum(lengths),), device=DEVICE),
        lengths_G=torch.tensor(lengths),  # on the host, to avoid a GPU synchronisation
        advantages_G=torch.linspace(-1, 1, len(lengths), device=DEVICE),
    )


def matmuls(hidden_ND, weight_VD, **_) -> Callable:
    return lambda: hidden_ND @ weight_VD.T


def ours(impl: str, **group) -> Callable:
    return lambda: tw_grpo_head(**group, impl=impl).loss


def compiled(**group) -> Callable:
    plain = torch.compile(tw_grpo_head)
    return lambda: plain(**group, impl="reference").loss


def liger(hidden_ND, weight_VD, targets_N, lengths_G, advantages_G) -> Callable:
    """liger-kernel 0.8.5. Raises ImportError if it is not installed."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    shape = len(lengths_G), int(lengths_G[0])
    options = dict(beta=0.0, epsilon_high=0.28, loss_type="bnpo", use_ref_model=False)
    head, mask = LigerFusedLinearGRPOLoss(**options), hidden_ND.new_ones(shape).float()
    hidden_GTD, targets_GT = hidden_ND.view(*shape, -1), targets_N.view(shape)
    return lambda: head(hidden_GTD, weight_VD, targets_GT, mask, advantages_G)[0]


CHUNKED = functools.partial(ours, "chunked")
BARE = "3 bare matmuls"
VARIANTS = {  # name: a group -> the forward to time, options of `make_group`
    BARE: (matmuls, {}),
    "chunked": (CHUNKED, {}),
    "fused": (functools.partial(ours, "fused"), {}),
    "chunked, frozen head": (CHUNKED, dict(frozen=True)),
    "chunked, lengths from 20 to 100 %": (CHUNKED, dict(lengths=RAGGED)),
    "compiled reference, float32": (compiled, {}),
    "Liger, no group weights": (liger, {}),
}


def measure(prepare: Callable, N: int, **options) -> dict:
    """Milliseconds, TFLOP/s, and MB of memory beyond inputs and gradients, for a group made by
    `make_group` with these options."""
    group = make_group(N, **options)
    leaves = [group[k] for k in ("hidden_ND", "weight_VD") if group[k].requires_grad]
    forward = prepare(**group)
    before = torch.cuda.memory_allocated() + sum(leaf.nbytes for leaf in leaves)

    def work():
        for leaf in leaves:
            leaf.grad = None
        with phase("forward"):
            loss = forward()
        with phase("backward"):
            loss.backward(loss.detach() if loss.dim() else None)  # the bare matmuls: any gradient

    row = {f"{name}_ms": 1e3 * s for name, s in medians(work, repeats=7, warm_up=2).items()}
    total, tokens = sum(row.values()), len(group["hidden_ND"])
    peak = torch.cuda.max_memory_allocated() - before
    tflops = 2 * (1 + len(leaves)) * tokens * D * V / total / 1e9  # one product per gradient
    return row | dict(total_ms=total, tokens=tokens, tflops=tflops, peak_mb=peak / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results to this file, row by row")
    results = Results(parser.parse_args().json)
    if not torch.cuda.is_available():
        raise SystemExit("error: measuring the head needs a CUDA device")

    def work(impl: str, N: int) -> dict:
        prepare, options = VARIANTS[impl]
        row = measure(prepare, N, **options)
        bare = row if impl == BARE else results.find(impl=BARE, N=N)
        return row | (dict(ratio=bare["tflops"] / row["tflops"]) if bare else {})

    for name, (_, options) in VARIANTS.items():
        for N in (8192,) if options else (8192, 1024, 32768):
            results.measure(work, impl=name, N=N)
    print(table(results.rows))


if __name__ == "__main__":
    main()
