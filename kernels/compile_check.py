"""Every kernel compiled ahead of time, without a GPU, with its registers, spills and shared memory.

    python -m kernels.compile_check             # sm_80, sm_90 and sm_100
    python -m kernels.compile_check --arch 90

Block sizes, warps and dtypes are those of production (bf16 in, D = 3584, G = 8). Exits 1 if a
kernel spills registers to memory. Needs Triton; must not run under TRITON_INTERPRET=1, where a
kernel is never compiled.
"""

import argparse
import itertools
import re
import subprocess
import tempfile
from pathlib import Path

SHARED_LIMIT = {80: 163, 90: 227, 100: 227}  # KB of shared memory one program may use


# Types of the kernels' arguments, by name: pointers are *fp32 and numbers i32 unless listed here.
POINTERS = dict(
    target="*i64", length="*i64", order="*i32", start="*i32", completion="*i32", position="*i32"
)
FLOATS = "alpha eps_low eps_high beta log_V inverse_temperature".split()


def cases(arch: int):
    """(name, kernel, input dtype, constants, warps, stages) of all that the head launches there."""
    from kernels import backward, chunked, fused, objective
    from kernels.head import Sizes

    sizes = Sizes()
    for weights, old, ref in ((True, False, False), (True, True, True), (False, True, True)):
        flags = dict(TOKEN_WEIGHTS=weights, HAS_OLD=old, HAS_REF=ref)
        name = f"objective weights={weights:d} old={old:d} ref={ref:d}"
        yield (
            name,
            objective.objective_kernel,
            "fp32",
            dict(**flags, BLOCK=sizes.objective_block),
            8,
            3,
        )
    yield "chunked rows", chunked.row_kernel, "fp32", dict(BLOCK=sizes.row_block), 8, 3
    for rows, textbook in itertools.product((1, 8, 16), (False, True)):
        name = f"chunked group rows={rows} textbook={textbook:d}"
        constants = dict(TEXTBOOK=textbook, UNIFORM=True, SLICES=4, ROWS=rows)
        constants["BLOCK"] = sizes.group_elements // rows
        yield name, chunked.group_kernel, "fp32", constants, 8, 3
    for dtype in ("bf16", "fp32"):
        kernel, constants = backward.softmax_gradient_kernel, dict(BLOCK=sizes.gradient_block)
        yield f"backward softmax gradient {dtype}", kernel, dtype, constants, 4, 3
    for dtype, tile in (("bf16", fused.TILES[arch // 10]), ("fp32", fused.FLOAT32_TILE)):
        run = tile.warps, tile.stages
        constants = dict(WORDS=tile.words, TOKENS=tile.tokens, DEPTH=tile.depth, EVEN_D=True)
        yield f"fused log-sum-exp {dtype}", fused.log_sum_exp_kernel, dtype, constants, *run
        for rows, textbook in itertools.product((1, 2, 4, 8, 16), (False, True)):
            name = f"fused divergence {dtype} rows={rows} textbook={textbook:d}"
            narrow = fused.divergence_tile(tile, rows, textbook)
            constants = dict(WORDS=narrow.words, TOKENS=narrow.tokens, DEPTH=narrow.depth)
            constants |= dict(EVEN_D=True, TEXTBOOK=textbook, UNIFORM=True, ROWS=rows)
            yield name, fused.divergence_kernel, dtype, constants, *run


def compile_for(arch: int, kernel, dtype: str, constants: dict, warps: int, stages: int) -> dict:
    """Registers a thread, spilled bytes and KB of shared memory of one kernel, as ptxas says."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    inputs = dict.fromkeys(("hidden", "weight", "gradient"), "*" + dtype)
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = (POINTERS | inputs).get(name.removesuffix("_ptr"), "*fp32")
        else:
            types[name] = "fp32" if name in FLOATS else "i32"
    # What the launcher sees by itself: tensors are aligned, and V, D, words are multiples of 16.
    aligned = [n.endswith("_ptr") or n in ("V", "D", "words") for n in kernel.arg_names]
    attributes = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(aligned) if yes}
    source = ASTSource(kernel, types, constants, attributes)
    options = dict(num_warps=warps, num_stages=stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    ptxas = (
        folder / "ptxas-blackwell"
        if arch >= 100 and (folder / "ptxas-blackwell").exists()
        else folder / "ptxas"
    )
    full_arch = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [ptxas, "-v", f"-arch={full_arch}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    return dict(
        arch=full_arch, registers=registers, spills=spills, shared=compiled.metadata.shared / 1024
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90, 100], choices=[80, 90, 100])
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    arguments = parser.parse_args()
    print(f"{'kernel':40} {'target':8} {'registers':>9} {'spills B':>9} {'shared KB':>10}")
    failed = []
    for arch in arguments.arch:
        for name, *case in cases(arch):
            if arguments.only not in name:
                continue
            r = compile_for(arch, *case)
            print(
                f"{name:40} {r['arch']:8} {r['registers']:9} {r['spills']:9} {r['shared']:10.1f}",
                flush=True,
            )
            if r["spills"] or r["shared"] > SHARED_LIMIT[arch]:
                failed.append(f"{name} on {r['arch']}")
    if failed:
        raise SystemExit("spilled registers or too much shared memory: " + "; ".join(failed))


if __name__ == "__main__":
    main()
