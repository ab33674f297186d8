"""Tensors in one buffer: every bit comes back, and one descriptor carries any number of them."""

import pickle

import numpy as np
import torch

from megatron_dlm.data.prefetch import Prefetcher
from megatron_dlm.data.tensor_buffer import Parcel, kinds_of, pack, unpack


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


def test_every_tensor_comes_back():
    found = unpack(pack(tensors()), kinds_of(tensors()))
    for expected, tensor in zip(tensors(), found, strict=True):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    assert unpack(pack([]), []) == []


def test_a_parcel_holds_any_object_and_each_tensor_once():
    shared = torch.ones(1000)
    content = {"a": [shared, (shared, 7)], "b": np.arange(3), "c": tensors()}
    parcel = Parcel(content)
    found = pickle.loads(pickle.dumps(parcel)).content()
    assert found["a"][0] is found["a"][1][0] and torch.equal(found["a"][0], shared)
    assert found["b"].tolist() == [0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(found["c"], tensors(), strict=True))
    assert parcel._buffer.nbytes < 4000 + 1000


def test_a_batch_of_many_tensors_needs_few_descriptors():
    """More tensors than a process may have open files."""
    source = Prefetcher(lambda n: [torch.full((2,), n + i) for i in range(3000)], lambda n: n + 1, workers=1)
    for number in range(4):
        made = source.get(number)
        assert [int(tensor[0]) for tensor in made] == list(range(number, number + 3000))
    source.close()
