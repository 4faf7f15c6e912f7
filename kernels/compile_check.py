"""Compiles every kernel ahead of time, without a GPU, and reports registers, spills, shared memory
and barriers.

    python -m kernels.compile_check    # for sm_80, sm_90 and sm_100

It runs the head, forward and backward, and the attention of a decoding step on tensors without
storage (device "meta") at production size. Each launch compiles what Triton would compile for
these arguments, so types, constants, warps and alignment are those of a real launch and need not be
repeated here. Exits with 1 if a kernel spills registers or needs too much shared memory, or if the
group kernel has a barrier inside its loop. Needs Triton; must not run under TRITON_INTERPRET=1,
where kernels are never compiled.
"""

import contextlib
import itertools
import re
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch

from kernels.head import tw_grpo_head

SHARED_LIMIT = {80: 163, 90: 227, 100: 227}  # KB of shared memory per program
GROUP_BARRIERS = 2  # for the sum after the loop; one more would be inside the loop
D, V = 3584, 152064


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[dict]:
    """Yields a dict {name: compiled kernel} that fills as the block launches kernels: each launch
    compiles for `arch` and runs nothing. A second specialisation with the same constants gets a
    name of its own, so no launch is missed."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found, launch = {}, JITFunction.run

    def compile_instead(kernel, *args, grid, warmup=False, **options):
        compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
        constants = [
            f"{k}={v if k == 'FORM' else int(v)}" for k, v in options.items() if k.isupper()
        ]
        bf16 = any(getattr(x, "dtype", None) == torch.bfloat16 for x in args)
        name = " ".join([kernel.__name__.removesuffix("_kernel"), *["bf16"] * bf16, *constants])
        while found.setdefault(name, compiled) is not compiled:
            name += " again"

    absent_gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,  # Triton caches compiled kernels per device
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(driver, "_active", absent_gpu),
        mock.patch.object(torch.cuda, "get_device_capability", lambda _: (arch // 10, 0)),
        mock.patch.object(JITFunction, "run", compile_instead),
    ):
        yield found


def launch_head(
    lengths: list[int],
    impl: str = "chunked",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "meta",
    **options: str,
) -> None:
    """Forward and backward for a group of these lengths, by default on tensors without storage."""
    N, G = sum(lengths), len(lengths)
    hidden_ND, weight_VD = (
        torch.empty(n, D, dtype=dtype, device=device, requires_grad=True) for n in (N, V)
    )
    targets_N = torch.zeros(N, dtype=torch.int64, device=device)
    group = (hidden_ND, weight_VD, targets_N, torch.tensor(lengths), torch.empty(G, device=device))
    tw_grpo_head(*group, impl=impl, **options).loss.backward()


def launch_decode(
    G: int, B: int = 1, H: int = 28, K: int = 4, P: int = 1100, T: int = 170, device: str = "meta"
) -> None:
    """The attention of one decoding step in bf16, by default with Qwen2.5-VL-7B's sizes."""
    from kernels import decode

    R, D, bf16 = B * G, 128, dict(dtype=torch.bfloat16, device=device)
    new = [torch.empty(R, heads, D, **bf16) for heads in (H, K, K)]
    rotation = torch.empty(2, R, D, **bf16)
    prompt, own = torch.empty(2, B, K, P, D, **bf16), torch.empty(2, R, K, T, D, **bf16)
    lengths_B, t = (torch.empty(n, dtype=torch.int64, device=device) for n in (B, 1))
    decode.launch(*new, *rotation, *prompt, lengths_B, *own, t, 0.09)


def launch_everything() -> None:
    """Launches each kernel with all its constants: group sizes, forms of D_t, dtypes."""
    forms = (dict(), dict(divergence="textbook"), dict(token_weights="entropy"))
    dtypes, impls = (torch.bfloat16, torch.float32), ("chunked", "fused")
    for G in (2, 4, 8, 16):
        launch_decode(G)
        for form, dtype, impl in itertools.product(forms, dtypes, impls):
            launch_head([300] * G, impl, dtype, **form)
    for form in forms:
        launch_head([300, 100], "fused", **form)  # one completion outlives the other


def properties(arch: int, compiled) -> tuple[str, int, int, float, int]:
    """Target, registers per thread, spilled bytes, KB of shared memory, and barriers."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    command = [get_ptxas(arch).path, "-v", f"-arch={target}", "/dev/stdin", "-o", "/dev/null"]
    run = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True)
    registers = int(re.search(r"Used (\d+) registers", run.stderr)[1])
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", run.stderr)))
    barriers = len(re.findall(r"\bbar(?:rier)?\.", ptx))
    return target, registers, spills, compiled.metadata.shared / 1024, barriers


def main() -> None:
    print(f"{'kernel':92} {'target':8} registers  spills B  shared KB  barriers")
    failed = []
    for arch, limit in SHARED_LIMIT.items():
        with compiling_for(arch) as found:
            launch_everything()
        for name, compiled in found.items():
            target, registers, spills, shared, barriers = properties(arch, compiled)
            print(f"{name:92} {target:8} {registers:9} {spills:9} {shared:10.1f} {barriers:9}")
            waits = name.startswith("group") and barriers > GROUP_BARRIERS
            if spills or shared > limit or waits:
                failed.append(f"{name} on {target}")
    if failed:
        raise SystemExit(
            "spilled registers, too much shared memory, or a barrier in the group kernel's loop: "
            + "; ".join(failed)
        )


if __name__ == "__main__":
    main()
