import json
import pickle
import sys

import pytest

from megatron_dlm.checkpointing.layout import CheckpointConfig, CheckpointRoot, step_of, verify
from megatron_dlm.checkpointing.safe_metadata import check_metadata
from megatron_dlm.interfaces import InputError


def make(root, step, content=b"weights"):
    directory = root.prepare(step)
    (directory / "a.distcp").write_bytes(content)
    (directory / "b.json").write_text("{}")
    return root.publish(step, {})


def test_a_checkpoint_appears_when_complete(tmp_path):
    root = CheckpointRoot(tmp_path / "run")
    assert root.complete() == []
    root.prepare(5)
    (root.temporary(5) / "a").write_bytes(b"x")
    assert root.complete() == []
    final = root.publish(5, {})
    assert root.complete() == [final] == [tmp_path / "run" / "step-00000005"]
    assert not root.temporary(5).exists()
    verify(final)


def test_leftovers_of_a_killed_save_are_passed_over_and_removed(tmp_path):
    root = CheckpointRoot(tmp_path)
    make(root, 1)
    root.prepare(2)
    (tmp_path / "step-00000003").mkdir()  # complete name, no manifest
    assert [path.name for path in root.complete()] == ["step-00000001"]
    make(root, 4)
    assert not root.temporary(2).exists()


def test_order_and_retention(tmp_path):
    root = CheckpointRoot(tmp_path)
    for step in (1, 20, 3):
        make(root, step)
    assert [path.name for path in root.complete()] == ["step-00000001", "step-00000003", "step-00000020"]
    root.retain(0, 0)
    assert len(root.complete()) == 3
    root.retain(2, 0)
    assert [path.name for path in root.complete()] == ["step-00000003", "step-00000020"]
    for step in (30, 40, 41, 42):
        make(root, step)
    root.retain(1, 20)
    assert [path.name for path in root.complete()] == ["step-00000020", "step-00000040", "step-00000042"]


def test_the_same_step_can_be_saved_again(tmp_path):
    root = CheckpointRoot(tmp_path)
    make(root, 1, b"old")
    assert (make(root, 1, b"new") / "a.distcp").read_bytes() == b"new"


FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
left = []
"""File operations until the next one is cut; empty where none is."""


def _cut(event, arguments):
    if left and event in FILE_EVENTS:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt(event)


sys.addaudithook(_cut)


def cut_at(operation, action):
    """Do `action` until so many file operations are done; whether it came to its end."""
    left[:] = [operation]
    try:
        action()
    except KeyboardInterrupt:
        return False
    finally:
        left.clear()
    return True


def test_a_step_saved_again_is_complete_at_each_moment(tmp_path):
    """Cut before each file operation, twice in a row, the newer or the older of both is there and sound."""
    for operation in range(200):
        root = CheckpointRoot(tmp_path / str(operation))
        make(root, 1, b"old")
        ended = cut_at(operation, lambda root=root: make(root, 1, b"new"))
        for _ in range(2):
            (found,) = root.complete()
            verify(found)
            assert (found / "a.distcp").read_bytes() in (b"old", b"new") and step_of(found) == 1
            cut_at(operation, lambda root=root: make(root, 1, b"new"))
        assert (make(root, 2).parent / "step-00000001").is_dir() == (root.complete()[0] == root.final(1))
        root.retain(1, 0)
        assert [path.name for path in root.path.iterdir()] == ["step-00000002"]
        if ended:
            break
    # Fewer and the save itself would not be in it.
    assert 10 < operation < 199


def test_damaged_later_checkpoints_do_not_count_as_the_newest(tmp_path):
    root = CheckpointRoot(tmp_path)
    for step in (2, 4, 8):
        make(root, step)
    root.set_aside_after(4)
    make(root, 6)
    root.retain(1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000008.damaged"]


DAMAGE = {
    "flip": (lambda d: (d / "a.distcp").write_bytes(b"weighty"), "SHA-256 differs"),
    "cut": (lambda d: (d / "a.distcp").write_bytes(b"we"), "not the 7 bytes"),
    "missing": (lambda d: (d / "a.distcp").unlink(), "missing"),
    "foreign": (lambda d: (d / "c").write_bytes(b""), "not in the manifest"),
    "manifest": (lambda d: (d / "manifest.json").unlink(), "not a complete checkpoint"),
    "manifest json": (lambda d: (d / "manifest.json").write_text("{"), "unreadable"),
    "manifest empty": (
        lambda d: (d / "manifest.json").write_text("{}"),
        "version None, this",
    ),
    "manifest of another folder": (
        lambda d: (d / "manifest.json").write_text(
            json.dumps({"version": 1, "files": {"../a": {"bytes": 1, "sha256": ""}}})
        ),
        "'../a' has not the name",
    ),
    "manifest of nothing": (
        lambda d: (d / "manifest.json").write_text(json.dumps({"version": 1, "files": {}})),
        "lists no files",
    ),
    "manifest list": (lambda d: (d / "manifest.json").write_text(json.dumps([1])), "not a JSON object"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(tmp_path, name):
    damage, message = DAMAGE[name]
    directory = make(CheckpointRoot(tmp_path), 1)
    damage(directory)
    with pytest.raises(InputError, match=message) as error:
        verify(directory)
    assert str(directory) in str(error.value)


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


def test_hostile_metadata_runs_nothing(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(f"touch {tmp_path}/ran")))
    with pytest.raises(InputError, match=r"names \w+.system, which checkpoint metadata never does"):
        check_metadata(tmp_path)
    assert not (tmp_path / "ran").exists()


def by_getattr(owner, name):
    """An object that is pickled as `getattr(owner, name)`, as Python 3.11.2 does members of enums."""
    return type("ByGetattr", (), {"__reduce__": lambda self: (getattr, (owner, name))})()


def test_members_of_enums_are_read_as_every_python_writes_them(tmp_path):
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

    write = (tmp_path / ".metadata").write_bytes
    member = by_getattr(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")
    write(pickle.dumps(Metadata(state_dict_metadata={"a": member}, storage_data={})))
    check_metadata(tmp_path)
    for owner, name in (
        (_MEM_FORMAT_ENCODING, "__init__"),
        (_MEM_FORMAT_ENCODING, "mro"),
        (Metadata, "__module__"),
    ):
        hidden = by_getattr(owner, name)
        write(pickle.dumps(Metadata(state_dict_metadata={"a": hidden}, storage_data={})))
        with pytest.raises(InputError, match="getattr for something else"):
            check_metadata(tmp_path)


@pytest.mark.parametrize("name", ["../../x.distcp", "/etc/x.distcp", "a.txt"])
def test_metadata_points_only_beside_itself(tmp_path, name):
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    storage = {MetadataIndex("w"): _StorageInfo(name, 0, 1)}
    metadata = Metadata(state_dict_metadata={}, storage_data=storage)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="points at"):
        check_metadata(tmp_path)


def write_metadata(directory, *, size=(4,), chunk=(4,), offset=0, length=16, file_bytes=16, link=False):
    """Metadata of one float32 tensor whose chunk begins at 0, and the file it is in."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    target = directory / ("elsewhere" if link else "__0_0.distcp")
    target.write_bytes(bytes(file_bytes))
    if link:
        (directory / "__0_0.distcp").symlink_to(target)
    zero = torch.Size([0] * len(chunk))
    tensor = TensorStorageMetadata(
        properties=TensorProperties(dtype=torch.float32),
        size=torch.Size(size),
        chunks=[ChunkStorageMetadata(zero, torch.Size(chunk))],
    )
    storage = {MetadataIndex("w", zero): _StorageInfo("__0_0.distcp", offset, length)}
    metadata = Metadata(state_dict_metadata={"w": tensor}, storage_data=storage)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


IMPOSSIBLE = {
    "huge tensor": ({"size": (2**60,), "chunk": (2**60,)}, "elements, and not the bytes for it"),
    "larger than its chunks": ({"size": (2**60,)}, "chunks of 4 elements"),
    "beyond the file": ({"length": 17}, "bytes 0 to 17 of .*, which has 16"),
    "before the file": ({"offset": -8}, "bytes -8 to 8"),
    "symbolic link": ({"link": True}, "points at '__0_0.distcp', not at a .distcp file beside it"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_metadata_is_refused_before_anything_is_reserved(tmp_path, name):
    fields, message = IMPOSSIBLE[name]
    write_metadata(tmp_path, **fields)
    with pytest.raises(InputError, match=message):
        check_metadata(tmp_path)


def test_metadata_has_a_largest_size(tmp_path, monkeypatch):
    write_metadata(tmp_path)
    check_metadata(tmp_path)
    monkeypatch.setattr("megatron_dlm.checkpointing.safe_metadata.LARGEST_BYTES", 100)
    with pytest.raises(InputError, match="bytes, more than 100"):
        check_metadata(tmp_path)


def test_links_in_a_checkpoint_are_refused(tmp_path):
    final = make(CheckpointRoot(tmp_path), 1)
    (tmp_path / "elsewhere").write_bytes((final / "a.distcp").read_bytes())
    (final / "a.distcp").unlink()
    (final / "a.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="a symbolic link"):
        verify(final)


def test_damaged_metadata_is_unreadable(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(InputError, match="unreadable"):
        check_metadata(tmp_path)


def test_a_removal_cut_short_leaves_no_complete_checkpoint(tmp_path, monkeypatch):
    root = CheckpointRoot(tmp_path)
    for step in (1, 2):
        make(root, step)
    monkeypatch.setattr("shutil.rmtree", lambda path: (path / "a.distcp").unlink())
    root.retain(1, 0)
    assert [path.name for path in root.complete()] == ["step-00000002"]


def test_config_is_checked():
    with pytest.raises(InputError, match=r"checkpoint.save_every: 0 is below 1"):
        CheckpointConfig(save_every=0)
