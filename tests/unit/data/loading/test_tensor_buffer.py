"""Tensors in one buffer: every bit comes back, memory that occurs twice once."""

import numpy as np
import torch

from megatron_dlm.data.loading.prefetch import Prefetcher
from megatron_dlm.data.loading.tensor_buffer import Layout, pack, unpack, with_tensors, without_tensors


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(-(2**62), 2**62, (2, 3), generator=generator),
        torch.rand(7, dtype=torch.float64, generator=generator),
        torch.rand(5, 3, generator=generator).T,
        torch.rand(3, 3, generator=generator) > 0.5,
        torch.empty(0, 4),
        torch.tensor(3.5),
        torch.rand(5, generator=generator).bfloat16(),
    ]


def through(some):
    layout = Layout.of(some)
    return unpack(pack(some, layout), layout)


def test_every_tensor_comes_back():
    for expected, tensor in zip(tensors(), through(tensors()), strict=True):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    assert through([]) == []


def test_views_of_one_memory_travel_once():
    mask = torch.rand(50, 50) > 0.5
    views = [mask[None, None] for _ in range(8)]
    layout = Layout.of([*views, mask.T, mask[:25]])
    assert layout.num_bytes < 4 * mask.nbytes
    found = unpack(pack([*views, mask.T, mask[:25]], layout), layout)
    assert all(torch.equal(view, mask[None, None]) for view in found[:8])
    assert torch.equal(found[8], mask.T) and torch.equal(found[9], mask[:25])


def test_an_object_is_whole_again():
    content = {"a": (tensors()[0], 7), "b": np.arange(3), "c": tensors()}
    pickled, found = without_tensors(content)
    assert len(found) == 8 and len(pickled) < 1000
    again = with_tensors(pickled, through(found))
    assert (
        torch.equal(again["a"][0], tensors()[0]) and again["a"][1] == 7 and again["b"].tolist() == [0, 1, 2]
    )
    assert all(torch.equal(a, b) for a, b in zip(again["c"], tensors(), strict=True))


def test_a_batch_of_many_tensors_needs_no_open_files():
    """More tensors than a process may have open files, and one without any."""
    source = Prefetcher(
        lambda n: [torch.full((2,), n + i) for i in range(3000 * n)], lambda n: n + 1, workers=1
    )
    for number in range(3):
        made = source.get(number)
        assert [int(tensor[0]) for tensor in made] == list(range(number, number + 3000 * number))
    source.close()
