"""Tensors through a DALI pipeline on the CPU: every bit arrives, in order."""

import pytest
import torch

from megatron_dlm.data.loading import dali
from megatron_dlm.data.loading.dali import require_dali, transfer_with_dali
from megatron_dlm.interfaces import InputError
from tests.helpers.skips import needs_dali

CPU = torch.device("cpu")


def batches(count):
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        yield [
            torch.randint(-(2**62), 2**62, (2, 3 + index), generator=generator),
            torch.rand(index % 3 + 1, dtype=torch.float64, generator=generator).T,
            torch.rand(5, 5, generator=generator) > 0.5,
            *[torch.rand(7, 2, generator=generator).T for _ in range(index % 2)],
        ]


@needs_dali
def test_every_bit_arrives_in_order():
    arrived = list(transfer_with_dali(batches(40), CPU))
    assert len(arrived) == 40
    for expected, found in zip(batches(40), arrived, strict=True):
        assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@needs_dali
def test_bad_data_is_reported_as_without_it():
    def one_bad():
        yield from batches(3)
        raise InputError("data: block 3 is bad")

    arrived = []
    with pytest.raises(InputError, match=r"^data: block 3 is bad$"):
        arrived.extend(len(tensors) for tensors in transfer_with_dali(one_bad(), CPU))
    # The good ones before it are not lost.
    assert arrived == [len(tensors) for tensors in batches(3)]


def test_a_machine_without_it_is_told(monkeypatch):
    monkeypatch.setattr(dali.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"data\.loader: dali needs NVIDIA DALI"):
        require_dali()
