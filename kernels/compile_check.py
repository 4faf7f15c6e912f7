"""Every kernel compiled ahead of time, as the head launches it, without a GPU: registers, spills,
shared memory, and barriers in the innermost loop.

    python -m kernels.compile_check             # sm_80, sm_90 and sm_100
    python -m kernels.compile_check --arch 90

The head itself runs, forward and backward, on tensors without storage (device "meta") at production
size; each launch compiles what Triton would compile for these arguments. So types, constants, warps
and alignment are those of a real launch and are stated nowhere else. Exits 1 if a kernel spills
registers, needs too much shared memory, or if the group kernel waits inside its loop. Needs Triton;
must not run under TRITON_INTERPRET=1, where a kernel is never compiled.
"""

import argparse
import contextlib
import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch

from kernels.head import Sizes, kernel_head, lay_out

SHARED_LIMIT = {80: 163, 90: 227, 100: 227}  # KB of shared memory one program may use
D, V = 3584, 152064


class Argument:
    """What a launch looks at in a tensor: its dtype and its address modulo 16. Allocations are
    aligned; views of them need not be."""

    def __init__(self, tensor):
        self.dtype, self.address = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.address


class AbsentGPU:
    """As much of a driver as compiling for a GPU needs."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device: one set for each architecture

    def get_current_stream(self, device) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(arch: int):
    """A dict {name: compiled kernel} that fills while the block launches kernels: each launch
    compiles for `arch` and runs nothing. A second specialisation of the same constants gets a
    name of its own, so that nothing launched goes unseen."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found, launch, before = {}, JITFunction.run, driver._active

    def compile_instead(kernel, *args, grid, warmup=False, **options):
        seen = [Argument(x) if getattr(x, "is_meta", False) else x for x in args]
        compiled = launch(kernel, *seen, grid=grid, warmup=True, **options)
        constants = [f"{k}={v:d}" for k, v in options.items() if k.isupper()]
        types = {str(x.dtype)[6:] for x in args if isinstance(x, torch.Tensor)}
        half = ["bf16"] if "bfloat16" in types else []
        name = " ".join([kernel.__name__.removesuffix("_kernel"), *half, *constants])
        while found.setdefault(name, compiled) is not compiled:
            name += " again"

    driver.set_active(AbsentGPU(arch))
    try:
        with mock.patch.object(JITFunction, "run", compile_instead):
            yield found
    finally:
        driver._active = before


def launch_head(
    arch: int, lengths: list[int], impl="chunked", dtype=torch.bfloat16, sizes=None, old=False,
    device="meta", **options,
) -> None:  # fmt: skip
    """Forward and backward of a group of these lengths, by default on tensors without storage."""
    from kernels import fused

    if sizes is None:
        tile = fused.FLOAT32_TILE if dtype == torch.float32 else fused.TILES[arch // 10]
        sizes = Sizes(tile=tile)
    N, G = sum(lengths), len(lengths)
    hidden_ND, weight_VD = (
        torch.empty(n, D, dtype=dtype, device=device, requires_grad=True) for n in (N, V)
    )
    logps_N = torch.empty(N, device=device) if old else None
    output = kernel_head(
        lay_out(lengths, device), hidden_ND, weight_VD,
        torch.empty(N, dtype=torch.int64, device=device),
        torch.empty(G, dtype=torch.int64, device=device), torch.empty(G, device=device),
        old_logps_N=logps_N, ref_logps_N=logps_N, impl=impl, sizes=sizes, **options,
    )  # fmt: skip
    output.loss.backward()


def launch_everything(arch: int) -> None:
    """Each kernel under each of its constants: group sizes, forms of D_t, loss types, dtypes."""
    for loss_type, beta in (("tw_grpo", 0.04), ("grpo", 0.04)):
        launch_head(arch, [300] * 8, old=True, loss_type=loss_type, beta=beta)
    for dtype, impl, G, divergence in itertools.product(
        (torch.bfloat16, torch.float32), ("chunked", "fused"), (1, 2, 4, 8, 16),
        ("official", "textbook"),
    ):  # fmt: skip
        launch_head(arch, [300] * G, impl, dtype, divergence=divergence)


def innermost_loop(ptx: str) -> list[str]:
    """Instructions of the longest stretch that a branch jumps back over and that holds no other."""
    lines = [line.partition("//")[0].strip() for line in ptx.splitlines()]
    labels = {line[:-1]: k for k, line in enumerate(lines) if re.fullmatch(r"\$L\w+:", line)}
    loops = []
    for k, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
        if jump and labels[jump[1]] < k:
            loops.append((labels[jump[1]], k))
    inner = [(a, b) for a, b in loops if not any(a <= c and d < b for c, d in loops)]
    first, last = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return [line for line in lines[first:last] if line.endswith(";")]


def barriers(ptx: str) -> int:
    """How often the warps of a program wait for one another in one turn of its innermost loop."""
    return sum(bool(re.search(r"\bbar(rier)?\.", line)) for line in innermost_loop(ptx))


def properties(arch: int, compiled) -> dict:
    """Registers a thread, spilled bytes, KB of shared memory, and barriers, as ptxas says."""
    import triton

    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    ptxas = folder / "ptxas-blackwell"
    ptxas = ptxas if arch >= 100 and ptxas.exists() else folder / "ptxas"
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"-arch={target}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return dict(
        target=target,
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spills=sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        shared=compiled.metadata.shared / 1024,
        barriers=barriers(ptx),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90, 100], choices=[80, 90, 100])
    arguments = parser.parse_args()
    print(f"{'kernel':92} {'target':8} registers  spills B  shared KB  barriers")
    failed = []
    for arch in arguments.arch:
        with compiling_for(arch) as found:
            launch_everything(arch)
        for name, compiled in found.items():
            r = properties(arch, compiled)
            print(
                f"{name:92} {r['target']:8} {r['registers']:9} {r['spills']:9} {r['shared']:10.1f}"
                f" {r['barriers']:9}",
                flush=True,
            )
            waits = name.startswith("group") and r["barriers"]
            if r["spills"] or r["shared"] > SHARED_LIMIT[arch] or waits:
                failed.append(f"{name} on {r['target']}")
    if failed:
        raise SystemExit(
            "spilled registers, too much shared memory, or a barrier in the group kernel's loop: "
            + "; ".join(failed)
        )


if __name__ == "__main__":
    main()
