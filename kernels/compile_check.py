"""Every kernel compiled ahead of time, without a GPU, with its registers, spills and shared memory.

    python -m kernels.compile_check             # sm_80, sm_90 and sm_100
    python -m kernels.compile_check --arch 90

Block sizes, warps and dtypes are those of production (bf16 in, D = 3584, G = 8). Exits 1 if a kernel spills registers
to memory. Needs Triton; must not run under TRITON_INTERPRET=1, where a kernel is never compiled.
"""

import argparse
import itertools
import re
import subprocess
import tempfile
from pathlib import Path

SHARED_LIMIT = {80: 163, 90: 227, 100: 227}  # KB of shared memory one program may use


def cases(arch: int):
    """(name, kernel, signature, constants, warps, stages) of everything the head launches on such a GPU."""
    from kernels import backward, chunked, fused, objective
    from kernels.head import Sizes

    sizes = Sizes()
    for flags in ((1, 0, 0), (1, 1, 1), (0, 1, 1)):
        yield (
            "objective weights={} old={} ref={}".format(*flags), objective.objective_kernel,
            dict(divergence_ptr="*fp32", logp_ptr="*fp32", old_ptr="*fp32", ref_ptr="*fp32", completion_ptr="*i32",
                 position_ptr="*i32", length_ptr="*i64", advantage_ptr="*fp32", weight_ptr="*fp32",
                 coefficient_ptr="*fp32", summary_ptr="*fp32", N="i32", T="i32", G="i32", alpha="fp32",
                 eps_low="fp32", eps_high="fp32", beta="fp32"),
            dict(zip(("TOKEN_WEIGHTS", "HAS_OLD", "HAS_REF"), map(bool, flags), strict=True),
                 BLOCK=sizes.objective_block), 8, 3,
        )  # fmt: skip
    yield (
        "chunked rows", chunked.row_kernel,
        dict(logits_ptr="*fp32", target_ptr="*i64", order_ptr="*i32", logp_ptr="*fp32", lse_ptr="*fp32", V="i32",
             inverse_temperature="fp32"),
        dict(BLOCK=sizes.row_block), 8, 3,
    )  # fmt: skip
    for rows, textbook in itertools.product((1, 8, 16), (False, True)):
        yield (
            f"chunked group rows={rows} textbook={textbook:d}", chunked.group_kernel,
            dict(logits_ptr="*fp32", lse_ptr="*fp32", order_ptr="*i32", start_ptr="*i32", partial_ptr="*fp32",
                 first_t="i32", V="i32", G="i32", log_V="fp32", inverse_temperature="fp32", slice_words="i32"),
            dict(TEXTBOOK=textbook, UNIFORM=True, SLICES=4, ROWS=rows, BLOCK=sizes.group_elements // rows), 8, 3,
        )  # fmt: skip
    for dtype in ("bf16", "fp32"):
        yield (
            f"backward softmax gradient {dtype}", backward.softmax_gradient_kernel,
            dict(logits_ptr="*fp32", gradient_ptr=f"*{dtype}", lse_ptr="*fp32", target_ptr="*i64",
                 coefficient_ptr="*fp32", upstream_ptr="*fp32", first_word="i32", words="i32",
                 inverse_temperature="fp32"),
            dict(BLOCK=sizes.gradient_block), 4, 3,
        )  # fmt: skip
    for dtype, tile in (("bf16", fused.TILES[arch // 10]), ("fp32", fused.FLOAT32_TILE)):
        inputs = dict(hidden_ptr=f"*{dtype}", weight_ptr=f"*{dtype}")
        yield (
            f"fused log-sum-exp {dtype}", fused.log_sum_exp_kernel,
            dict(**inputs, target_ptr="*i64", picked_ptr="*fp32", partial_ptr="*fp32",
                 N="i32", V="i32", D="i32", inverse_temperature="fp32", slice_tiles="i32"),
            dict(WORDS=tile.words, TOKENS=tile.tokens, DEPTH=tile.depth, EVEN_D=True), tile.warps, tile.stages,
        )  # fmt: skip
        for rows, textbook in itertools.product((1, 2, 4, 8, 16), (False, True)):
            narrow = fused.divergence_tile(tile, rows)
            yield (
                f"fused divergence {dtype} rows={rows} textbook={textbook:d}", fused.divergence_kernel,
                dict(**inputs, lse_ptr="*fp32", order_ptr="*i32", start_ptr="*i32", partial_ptr="*fp32",
                     first_t="i32", last_t="i32", V="i32", D="i32", T="i32", G="i32", log_V="fp32",
                     inverse_temperature="fp32", slice_tiles="i32"),
                dict(TEXTBOOK=textbook, UNIFORM=True, ROWS=rows, EVEN_D=True, WORDS=narrow.words,
                     TOKENS=narrow.tokens, DEPTH=tile.depth), tile.warps, tile.stages,
            )  # fmt: skip


def compile_for(arch: int, kernel, signature, constants, warps, stages) -> dict:
    """Registers a thread, spilled bytes and KB of shared memory of one kernel, as ptxas reports them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # What the launcher finds out by itself: tensors are aligned, and V, D and the slices are multiples of 16.
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name in ("V", "D", "words")]
    source = ASTSource(
        kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants,
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )  # fmt: skip
    options = dict(num_warps=warps, num_stages=stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    ptxas = folder / "ptxas-blackwell" if arch >= 100 and (folder / "ptxas-blackwell").exists() else folder / "ptxas"
    full_arch = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [ptxas, "-v", f"-arch={full_arch}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    return dict(arch=full_arch, registers=registers, spills=spills, shared=compiled.metadata.shared / 1024)


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
            print(f"{name:40} {r['arch']:8} {r['registers']:9} {r['spills']:9} {r['shared']:10.1f}", flush=True)
            if r["spills"] or r["shared"] > SHARED_LIMIT[arch]:
                failed.append(f"{name} on {r['arch']}")
    if failed:
        raise SystemExit("spilled registers or too much shared memory: " + "; ".join(failed))


if __name__ == "__main__":
    main()
