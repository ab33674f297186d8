"""Marks of tests that need what a machine may not have."""

import pytest

from megatron_dlm.data.loading.dali import require_dali
from megatron_dlm.interfaces import InputError


def _has_dali():
    try:
        require_dali()
    except InputError:
        return False
    return True


needs_dali = pytest.mark.skipif(
    not _has_dali(), reason="NVIDIA DALI is not installed: pip install nvidia-dali-cuda130"
)
