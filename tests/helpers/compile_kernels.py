"""Compile every Triton kernel for a GPU that need not be there; prints name, registers, stack bytes of each.

python -m tests.helpers.compile_kernels [--capability 90]
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_dlm.kernels import biased_gelu, residual_norm, residual_norm_kernels, rotary, row_softmax
from megatron_dlm.kernels.block_sizes import tiles_of

LOW, WIDE, IDS = "*bf16", "*fp32", "*i64"
WIDTHS = {"BLOCK": row_softmax.LARGEST_BLOCK, "WIDE": tl.float32}
"""For the hidden size of the largest published model, 2176, and 32,001 ids."""
SUMS = {"BLOCK": row_softmax.LARGEST_DIVERGENCE_BLOCK, "WIDE": tl.float32}
MLP = {"BLOCK": 1024, "WIDE": tl.float32}
ROW = {"branch": LOW, "bias": LOW, "weight": LOW, "y": LOW, "dy": LOW, "dbranch": LOW}
KERNELS = [
    (row_softmax._statistics, {"logits": LOW, "ids": IDS}, WIDTHS),
    (row_softmax._cross_entropy_gradient, {"logits": LOW, "ids": IDS}, WIDTHS),
    (row_softmax._cross_entropy, {"logits": LOW, "ids": IDS}, WIDTHS),
    (row_softmax._divergence_sums, {"logits": LOW, "noisy": IDS, "clean": IDS}, SUMS | {"WHOLE": True}),
    (row_softmax._divergence_sums, {"logits": LOW, "noisy": IDS, "clean": IDS}, SUMS | {"WHOLE": False}),
    (row_softmax._divergence_gradient, {"logits": LOW, "noisy": IDS, "clean": IDS}, WIDTHS),
    *(
        (kernel, ROW, {"WIDE": tl.float32, **tiles, **which})
        for width in (768, 2176)
        for tiles in [dict(zip(("MAIN", "TAIL"), tiles_of(width), strict=True))]
        for which in (
            {"BRANCH": False, "BIASED": False, "NORM": True},
            {"BRANCH": True, "BIASED": False, "NORM": True},
            {"BRANCH": True, "BIASED": True, "NORM": False},
        )
        for kernel in (residual_norm_kernels.add_and_norm, residual_norm_kernels.add_and_norm_gradient)
    ),
    (biased_gelu._forward, {"x": LOW, "bias": LOW, "y": LOW}, MLP),
    (biased_gelu._backward, {"dy": LOW, "x": LOW, "bias": LOW, "dx": LOW}, MLP),
    (rotary._rotate, {"x": LOW, "out": LOW}, {"WIDE": tl.float32, "HEADS": 32, "HALF": 64}),
]
"""Kernel, pointers that are not to float32, and what is fixed when it is compiled."""
INTEGERS = (
    *("stride", "width", "first", "mask_id", "size", "rows", "length", "batch", "heads", "half"),
    *("sequence_stride", "batch_stride", "head_stride", "table_batch"),
    *("gate_stride", "shift_stride", "scale_stride"),
)
FLOATS = ("epsilon", "sign")


def kind_of(name, pointers):
    """Triton's type of one argument."""
    if name in INTEGERS:
        return "i32"
    return "fp32" if name in FLOATS else pointers.get(name, WIDE)


def compiled(kernel, pointers, constants, capability):
    """The machine code of one kernel."""
    constants = {"STREAM": True, **constants} if "STREAM" in kernel.arg_names else constants
    signature = {
        name: "constexpr" if name in constants else kind_of(name, pointers) for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    warps = 8 if constants.get("BLOCK", 0) >= 2048 else 4
    if "MAIN" in constants:
        is_backward = kernel is residual_norm_kernels.add_and_norm_gradient
        columns = residual_norm.BACKWARD_COLUMNS if is_backward else residual_norm.FORWARD_COLUMNS
        warps = residual_norm._warps(constants["MAIN"], columns)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"]


def resources(code):
    """Registers of a thread, and bytes of its stack, where what does not fit is spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK"))


def main():
    """Compile and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, default=90, help="compute capability, 90 for Hopper")
    arguments = parser.parse_args()
    for kernel, pointers, constants in KERNELS:
        parts = "+".join(
            part.lower() for part in ("BRANCH", "BIASED", "NORM", "WHOLE") if constants.get(part)
        )
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        name += f":{parts}" if parts else ""
        name += f":{constants['MAIN']}+{constants['TAIL']}" if "MAIN" in constants else ""
        print(name, *resources(compiled(kernel, pointers, constants, arguments.capability)), flush=True)


if __name__ == "__main__":
    main()
