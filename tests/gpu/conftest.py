"""Where the tests of this folder run, and the processes they share."""

import os

import pytest

from tests.helpers.devices import DEVICE, HAS_CUDA
from tests.helpers.verbs import VerbProcess

REHEARSES = os.environ.get("MEGATRON_DLM_REHEARSE") == "1"
ANYWHERE = ("test_cases.py", "test_several.py")
"""These need no GPU."""


def pytest_collection_modifyitems(config, items):
    """Marks and skips by device; the sanitizer's tests are left out unless -m asks for them."""
    here = [item for item in items if item.path.parent.name == "gpu"]
    for item in here:
        if item.path.name != "test_cases.py":
            item.add_marker(pytest.mark.gpu)
        if item.path.name not in ANYWHERE and not HAS_CUDA and not REHEARSES:
            item.add_marker(
                pytest.mark.skip(reason="no CUDA device; MEGATRON_DLM_REHEARSE=1 tries it on the CPU")
            )
        if item.path.name == "test_several.py" and not HAS_CUDA:
            item.add_marker(pytest.mark.slow)
    if "sanitizer" not in config.option.markexpr:
        unwanted = [item for item in here if item.get_closest_marker("sanitizer")]
        config.hook.pytest_deselected(items=unwanted)
        items[:] = [item for item in items if item not in unwanted]


def _process(device):
    process = VerbProcess(device)
    yield process
    process.stop()


@pytest.fixture(scope="session")
def verbs():
    """Runs verbs in a process that has the GPU."""
    yield from _process(DEVICE)


@pytest.fixture(scope="session")
def verbs_on_cpu():
    """Runs verbs in a process that sees no GPU."""
    yield from _process("cpu")
