"""Every kind of damage to a checkpoint is found before anything is loaded."""

import itertools
import random
import shutil

import pytest

from megatron_dlm.checkpointing.layout import verify
from megatron_dlm.interfaces import InputError

FLIPS, CUTS = 200, 20


@pytest.fixture
def checkpoint(uninterrupted, tmp_path):
    return shutil.copytree(uninterrupted[0] / "checkpoints" / "step-00000014", tmp_path / "step-00000014")


def assert_found(checkpoint, *names):
    with pytest.raises(InputError) as error:
        verify(checkpoint)
    assert any(str(checkpoint / name) in str(error.value) for name in names), error.value


def test_random_flips_and_cuts_are_found_and_named(checkpoint):
    dice = random.Random(0)
    files = sorted(checkpoint.iterdir())
    for index in range(FLIPS + CUTS):
        path = dice.choice(files)
        content = path.read_bytes()
        place = dice.randrange(len(content))
        if index < FLIPS:
            path.write_bytes(
                content[:place] + bytes([content[place] ^ (1 << dice.randrange(8))]) + content[place + 1 :]
            )
        else:
            path.write_bytes(content[:place])
        # Damage of the manifest may show as a file of another name.
        assert_found(checkpoint, path.name if path.name != "manifest.json" else "")
        path.write_bytes(content)
    verify(checkpoint)


def test_missing_and_swapped_files_are_found(checkpoint):
    files = sorted(path for path in checkpoint.iterdir() if path.name != "manifest.json")
    for path in [*files, checkpoint / "manifest.json"]:
        hidden = path.rename(checkpoint.parent / "hidden")
        assert_found(checkpoint, path.name)
        hidden.rename(path)
    for first, second in itertools.pairwise(files):
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])
        assert_found(checkpoint, first.name, second.name)
        first.write_bytes(contents[0])
        second.write_bytes(contents[1])
    verify(checkpoint)
