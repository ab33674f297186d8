"""Maps full tensors by public name to this process's parameters, for initialization, import and export.

Public names and shapes are those of the paper's code (github.com/s-sahoo/scaling-dllms, models/dit.py).
megatron-core keeps query, key and value of a head together, pads heads and vocabulary, and cuts tensors
over tensor parallel ranks; `WeightPlace` goes both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_dlm.models.config import FREQUENCY_CHANNELS, ModelConfig
from megatron_dlm.platform.parallel import ParallelState
from megatron_dlm.platform.vocab_parallel import padded_vocabulary_size

if TYPE_CHECKING:
    from megatron_dlm.models.denoiser import ChunkedDenoiser, Denoiser

Cut = Callable[[Tensor], Tensor]
Join = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class WeightPlace:
    """A parameter of this process, its public name, and the way between the two."""

    parameter: nn.Parameter
    name: str
    """Public name, for example "blocks.3.mlp.0.weight"."""
    shape: tuple[int, ...]
    """Shape of the full, unpadded tensor."""
    cut: Cut
    """This rank's part of the full tensor, padding included."""
    join: Join
    """The full tensor from the parts of all tensor parallel ranks, in rank order."""


def weight_places(denoiser: Denoiser | ChunkedDenoiser, parallel: ParallelState) -> Iterator[WeightPlace]:
    """Every parameter of this process, once.

    Args:
        denoiser: this process's stage.
        parallel: this process's place.

    Yields:
        One place per parameter.
    """
    model = denoiser.model
    full_shapes = public_shapes(model, denoiser.vocabulary.size)
    for chunk in denoiser.chunks:
        for local_name, parameter in chunk.named_parameters():
            name = _public_name(local_name, chunk)
            cut, join = _transfer(name, model, denoiser.vocabulary.size, parallel)
            yield WeightPlace(parameter, name, full_shapes[name], cut, join)


def local_tensors(
    state: Mapping[str, Tensor], denoiser: Denoiser | ChunkedDenoiser, parallel: ParallelState
) -> dict[nn.Parameter, Tensor]:
    """This process's part of full tensors.

    Args:
        state: full tensors by public name.
        denoiser: this process's stage.
        parallel: this process's place.

    Returns:
        A float32 tensor of its shape for every parameter.
    """
    return {
        place.parameter: place.cut(state[place.name]).to(parallel.device, torch.float32)
        for place in weight_places(denoiser, parallel)
    }


def public_shapes(model: ModelConfig, vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    """Shape of every full tensor by public name, in the order of the model."""
    d, f, c, v = model.hidden_size, model.ffn_hidden_size, model.conditioning_size, vocabulary_size
    shapes: dict[str, tuple[int, ...]] = {
        "vocab_embed.embedding": (v, d),
        "sigma_map.mlp.0.weight": (c, FREQUENCY_CHANNELS),
        "sigma_map.mlp.0.bias": (c,),
        "sigma_map.mlp.2.weight": (c, c),
        "sigma_map.mlp.2.bias": (c,),
    }
    layer: dict[str, tuple[int, ...]] = {
        "norm1.weight": (d,),
        "attn_qkv.weight": (3 * d, d),
        "attn_out.weight": (d, d),
        "norm2.weight": (d,),
        "mlp.0.weight": (f, d),
        "mlp.0.bias": (f,),
        "mlp.2.weight": (d, f),
        "mlp.2.bias": (d,),
        "adaLN_modulation.weight": (6 * d, c),
        "adaLN_modulation.bias": (6 * d,),
    }
    for index in range(model.num_layers):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in layer.items()}
    return shapes | {
        "output_layer.norm_final.weight": (d,),
        "output_layer.linear.weight": (v, d),
        "output_layer.linear.bias": (v,),
        "output_layer.adaLN_modulation.weight": (2 * d, c),
        "output_layer.adaLN_modulation.bias": (2 * d,),
    }


_PREFIXES = {
    "embedding.weight": "vocab_embed.embedding",
    "time_embedder.linear_in": "sigma_map.mlp.0",
    "time_embedder.linear_out": "sigma_map.mlp.2",
    "final_layer.norm": "output_layer.norm_final",
    "final_layer.modulation": "output_layer.adaLN_modulation",
    "head": "output_layer.linear",
}
_LAYER_PREFIXES = {
    "norm1": "norm1",
    "self_attention.linear_qkv": "attn_qkv",
    "self_attention.linear_proj": "attn_out",
    "norm2": "norm2",
    "mlp.linear_fc1": "mlp.0",
    "mlp.linear_fc2": "mlp.2",
    "modulation": "adaLN_modulation",
}


def _public_name(local_name: str, denoiser: Denoiser) -> str:
    if local_name in _PREFIXES:
        return _PREFIXES[local_name]
    module, _, kind = local_name.rpartition(".")
    if module in _PREFIXES:
        return f"{_PREFIXES[module]}.{kind}"
    _, _, index, inner = module.split(".", 3)
    layer_number = denoiser.block.layers[int(index)].layer_number
    return f"blocks.{layer_number - 1}.{_LAYER_PREFIXES[inner]}.{kind}"


def stored_place(name: str) -> tuple[str, int | None]:
    """Checkpoint key of a tensor, and its layer index, since layers are stacked along the first axis.

    Args:
        name: public name of the tensor.

    Returns:
        Key of the stored tensor, padding included, and the layer's index; None for a tensor outside layers.
    """
    module, _, kind = name.rpartition(".")
    if name in _PREFIXES.values():
        return next(local for local, public in _PREFIXES.items() if public == name), None
    for local, public in _PREFIXES.items():
        if public == module:
            return f"{local}.{kind}", None
    _, index, inner = module.split(".", 2)
    local = next(local for local, public in _LAYER_PREFIXES.items() if public == inner)
    return f"block.layers.{local}.{kind}", int(index)


def unpadded_size(key: str, size: Sequence[int], vocabulary_size: int) -> list[int]:
    """The size of a stored tensor without the rows that pad the vocabulary.

    Args:
        key: checkpoint key of a weight, or of the optimizer state of a weight.
        size: stored size.
        vocabulary_size: number of ids.

    Returns:
        `size`, with `vocabulary_size` rows if the tensor has one row per id.
    """
    names = ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias")
    has_rows_of_ids = any(
        key == stored or key.endswith(f".{stored}") for stored, _ in map(stored_place, names)
    )
    return [vocabulary_size, *size[1:]] if has_rows_of_ids else list(size)


def from_stored(name: str, tensor: Tensor, num_attention_heads: int) -> Tensor:
    """A public tensor from the unpadded part of what a checkpoint has, whose heads lie one by one."""
    return _qkv_by_kind(tensor, num_attention_heads) if name.endswith("attn_qkv.weight") else tensor


def _transfer(
    name: str, model: ModelConfig, vocabulary_size: int, parallel: ParallelState
) -> tuple[Cut, Join]:
    """Functions that shard the tensor `name` for this tensor parallel rank, and that join the shards."""
    rank, size = parallel.tensor_rank, parallel.tensor_size
    heads, padded_heads = model.num_attention_heads, model.padded_heads(size)
    if name.endswith("attn_qkv.weight"):
        to_heads = partial(_qkv_by_head, heads=heads)
        join_heads = partial(_join, length=3 * model.hidden_size, dim=0)
        return (
            lambda full: _cut(to_heads(full), 3 * model.head_dim * padded_heads, 0, rank, size),
            lambda parts: _qkv_by_kind(join_heads(parts), heads),
        )
    if name.endswith("attn_out.weight"):
        dim, length, padded = 1, model.hidden_size, model.head_dim * padded_heads
    elif name.endswith("mlp.2.weight") and name.startswith("blocks."):
        dim, length, padded = 1, model.ffn_hidden_size, model.ffn_hidden_size
    elif ".mlp.0." in name and name.startswith("blocks."):
        dim, length, padded = 0, model.ffn_hidden_size, model.ffn_hidden_size
    elif name in ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"):
        dim, length = 0, vocabulary_size
        padded = padded_vocabulary_size(vocabulary_size, size, parallel.vocabulary_multiple)
    else:
        return (lambda full: full), (lambda parts: parts[0])
    return (
        lambda full: _cut(full, padded, dim, rank, size),
        lambda parts: _join(parts, length=length, dim=dim),
    )


def _cut(full: Tensor, padded: int, dim: int, rank: int, size: int) -> Tensor:
    """Zeros up to `padded` along `dim`, then the `rank`-th of `size` equal parts."""
    missing = list(full.shape)
    missing[dim] = padded - full.shape[dim]
    whole = torch.cat([full, full.new_zeros(missing)], dim) if missing[dim] else full
    return whole.chunk(size, dim)[rank]


def _join(parts: Sequence[Tensor], *, length: int, dim: int) -> Tensor:
    return torch.cat(list(parts), dim).narrow(dim, 0, length)


def _qkv_by_head(weight: Tensor, heads: int) -> Tensor:
    """Rows (3, heads, head_dim) as published -> (heads, 3, head_dim) as megatron-core keeps them."""
    return weight.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def _qkv_by_kind(weight: Tensor, heads: int) -> Tensor:
    return weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
