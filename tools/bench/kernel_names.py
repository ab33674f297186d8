"""Which part of a training step a kernel of a GPU, or an operator of a CPU, belongs to, by its name.

Kernels of this package are known by the file they are written in; where several files name a kernel alike,
the autograd function that launched it tells them apart. Other names are matched by patterns, the first that
fits.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_dlm"
OTHER = "other"
FILES = {
    "kernels/biased_gelu.py": "GELU",
    "kernels/residual_norm.py": "norms and gates",
    "kernels/residual_norm_kernels.py": "norms and gates",
    "kernels/rotary.py": "norms and gates",
    "kernels/row_softmax.py": "head",
    "models/head.py": "head",
}
"""Part of all that the kernels and autograd functions of a file do."""
PATTERNS = {
    "communication": r"nccl|c10d::|gloo",
    "attention": r"attention|flash|fmha|sdpa|scaled_\w*softmax|\bthd_|fused_attn",
    "optimizer": r"adam|multi_tensor|l2norm|_foreach_|Optimizer\.|clip_coef",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitk|gemv|^dot_kernel"
    r"|aten::(mm|addmm|bmm|baddbmm|linear|mv)$",
    "GELU": r"gelu",
    "norms and gates": r"layer_?norm|GammaBeta|addcmul",
    "head": r"softmax|cross_entropy|nll_loss|log1p|logsumexp|scatter",
    "additions": r"CUDAFunctor_?(OnSelf_|OnOther_)?add|add_kernel|AddFunctor|reduce_kernel"
    r"|aten::(add|add_|sum)$",
    "scaling": r"MulFunctor|DivFunctor|aten::(mul|div)_?$",
    "rows by index": r"index|embedding|gather|radix|DeviceSort|DeviceScan",
    "copies": r"memcpy|memset|copy_kernel|copy_device|CatArrayBatched|FillFunctor"
    r"|aten::(copy_|to|_to_copy|clone|cat|contiguous|fill_|zero_)$",
    "amax": r"amax|compute_scale",
    "casts": r"transformer_engine.*(cast|quanti|unary|transpose)|cast_transpose|quantize|block_scal",
}
"""Names that are of no file here. Additions hold sums over rows too: gradients of biases and norms."""
PARTS = (*dict.fromkeys([*PATTERNS, *FILES.values()]), OTHER)
WAITS = re.compile(r"^(cuda|hip)(StreamSynchronize|DeviceSynchronize|EventSynchronize|Memcpy|Memset)$")
"""Calls of CUDA's runtime in which the CPU waits for the GPU."""
LAUNCHES = re.compile(r"^cu(da)?Launch(Cooperative)?Kernel")


@cache
def names_of(file: str) -> tuple[frozenset[str], frozenset[str]]:
    """Triton kernels, and autograd functions, that a file of the package defines.

    Args:
        file: below the package.

    Returns:
        Both kinds' names.
    """
    body = ast.parse((PACKAGE / file).read_text()).body
    kernels = {
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(mark).startswith("triton.jit") for mark in node.decorator_list)
    }
    functions = {
        node.name
        for node in body
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith("autograd.Function") for base in node.bases)
    }
    return frozenset(kernels), frozenset(functions)


def files_with_kernels() -> list[str]:
    """Files of the package that define a Triton kernel."""
    files = [str(path.relative_to(PACKAGE)) for path in sorted((PACKAGE / "kernels").glob("*.py"))]
    return [file for file in files if names_of(file)[0]]


def part_of(name: str, callers: Sequence[str] = ()) -> str:
    """The part.

    Args:
        name: of a kernel, or of an operator.
        callers: operators around its launch, innermost first, as a profile names them.

    Returns:
        One of `PARTS`.
    """
    for caller in callers:
        if caller.startswith("Optimizer.step"):
            return "optimizer"
        function = caller.rpartition(": ")[2].removesuffix("Backward")
        for file, part in FILES.items():
            if function in names_of(file)[1]:
                return part
    owners = {part for file, part in FILES.items() if name in names_of(file)[0]}
    if len(owners) == 1:
        return owners.pop()
    for part, pattern in PATTERNS.items():
        if part in ("amax", "casts") and "at::native" in name:
            continue
        if re.search(pattern, name, re.IGNORECASE):
            return part
    return OTHER
