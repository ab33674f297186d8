"""FP8 recipes for the layers' linears, and the operand shapes they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dlm.interfaces import InputError

Fp8Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]
Fp8Format = Literal["hybrid", "e4m3"]
MULTIPLES: dict[str, int] = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}
"""What divides rows and columns of every operand (cuBLAS; Transformer Engine's MXFP8 blocks)."""
CAPABILITIES: dict[str, tuple[int, int]] = {
    "tensorwise": (8, 9),
    "delayed": (8, 9),
    "blockwise": (9, 0),
    "mxfp8": (10, 0),
}
"""Least CUDA compute capability that multiplies so (Transformer Engine 2.11, quantization.py)."""


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """FP8 matrix products of the layers, with --training.precision fp8. The head stays in bf16."""

    recipe: Fp8Recipe = "tensorwise"
    """How FP8 scales are chosen. tensorwise: by each tensor's own maximum; delayed: by the maxima of earlier
    steps; blockwise: per 128 values of an activation's row and 128 x 128 of a weight; mxfp8: per 32 values
    (Blackwell)."""
    format: Fp8Format = "hybrid"
    """FP8 formats. hybrid: E5M2 for gradients, E4M3 for the rest; e4m3: E4M3 for all."""
    margin: int = 0
    """Powers of two that delayed scaling leaves below the format's largest number."""
    amax_history_len: int = 16
    """Maxima that delayed scaling remembers: of this many steps (microbatches in Transformer Engine)."""
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """Maximum that delayed scaling uses: the largest or the most recent one of those it remembers."""
    weights: bool = False
    """Keep the layers' weights in FP8 beside the fp32 main weights and gather them in FP8: half the bytes of
    bf16, and no cast before each product. Needs Transformer Engine and parallel.use_distributed_optimizer;
    not for mxfp8."""
    layers_at_start_in_bf16: int = 0
    """First layers of the model to keep in bf16; not with delayed scaling."""
    layers_at_end_in_bf16: int = 0
    """Last layers of the model to keep in bf16; not with delayed scaling."""

    def __post_init__(self) -> None:
        for name in ("margin", "layers_at_start_in_bf16", "layers_at_end_in_bf16"):
            if getattr(self, name) < 0:
                raise InputError(f"fp8.{name}: {getattr(self, name)} is below 0")
        if self.amax_history_len < 1:
            raise InputError(f"fp8.amax_history_len: {self.amax_history_len} is below 1")
        if self.weights and self.recipe == "mxfp8":
            raise InputError("fp8.weights: True, and mxfp8 keeps bf16 weights")
        if self.recipe == "delayed" and self.has_bf16_layers:
            raise InputError("fp8.recipe: delayed takes no layers_at_start_in_bf16 or layers_at_end_in_bf16")

    def check_capability(self, capability: tuple[int, int], gpu: str) -> None:
        """Refuse a GPU without FP8 products of this recipe.

        Args:
            capability: CUDA compute capability.
            gpu: its name, for the message.

        Raises:
            InputError: it has none.
        """
        least = CAPABILITIES[self.recipe]
        if capability < least:
            raise InputError(
                f"training.precision: fp8 with fp8.recipe {self.recipe} needs compute capability "
                f"{least[0]}.{least[1]} or above, and this is {gpu}; --training.transformer-impl local "
                "emulates it"
            )

    @property
    def has_bf16_layers(self) -> bool:
        """Whether some layers stay in bf16."""
        return self.layers_at_start_in_bf16 + self.layers_at_end_in_bf16 > 0

    @property
    def multiple(self) -> int:
        """What must divide the rows and columns of operands."""
        return MULTIPLES[self.recipe]

    def check_shapes(self, sizes: dict[str, int]) -> None:
        """Refuse operands that FP8 products cannot take.

        Args:
            sizes: rows and columns on one process, by what they come from.

        Raises:
            InputError: one that the recipe's multiple does not divide.
        """
        multiple = self.multiple
        for name, size in sizes.items():
            if size % multiple:
                raise InputError(
                    f"fp8.recipe: {self.recipe} needs multiples of {multiple}, not {name} = {size}"
                )

    def check_layers(self, stage_layers: list[int]) -> None:
        """Refuse more bf16 layers than the pipeline's first or last stage has.

        Args:
            stage_layers: layers of each stage.

        Raises:
            InputError: more than megatron-core takes.
        """
        most = sum(stage_layers) // len(stage_layers)
        for name in ("layers_at_start_in_bf16", "layers_at_end_in_bf16"):
            if getattr(self, name) > most:
                raise InputError(f"fp8.{name}: {getattr(self, name)} exceeds the {most} layers of a stage")
