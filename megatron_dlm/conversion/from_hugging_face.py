"""Reading an exported folder: weights by name, and what its configuration says. No code in it is run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dlm.conversion.to_hugging_face import CONFIG, INDEX, REPORT, RUN, shape_fields
from megatron_dlm.data.tokenizers.tokenizer import TOKENIZER_FILE
from megatron_dlm.interfaces import InputError, Vocabulary
from megatron_dlm.models.config import ModelConfig
from megatron_dlm.models.weight_mapping import public_shapes
from megatron_dlm.platform.files import sha256_of

MODEL_TYPE = "megatron_dlm"
SINGLE_FILE = "model.safetensors"
LARGEST_JSON_BYTES = 64 << 20
WEIGHT_SUFFIX = ".safetensors"
FLOATS = ("F32", "BF16", "F16")
PICKLE_STARTS = (b"PK", b"\x80")
"""First bytes of torch.save's archives and of plain pickles."""


class WeightFolder:
    """A folder with config.json and weights in safetensors files."""

    def __init__(self, path: Path) -> None:
        """Open the folder.

        Args:
            path: directory.

        Raises:
            InputError: the folder has no readable config.json.
        """
        self.path = path
        if not (path / CONFIG).is_file():
            raise self._complaint(f"has no {CONFIG}")
        self.config = self._json(CONFIG)

    def _complaint(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}")

    def _json(self, name: str) -> dict[str, Any]:
        path = self._inside(name)
        try:
            if path.stat().st_size > LARGEST_JSON_BYTES:
                raise self._complaint(f"{name}: more than {LARGEST_JSON_BYTES:,} bytes")
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise self._complaint(f"{name}: unreadable: {error}") from error
        if not isinstance(data, dict):
            raise self._complaint(f"{name}: holds a {type(data).__name__}, not an object")
        return data

    def _inside(self, name: object) -> Path:
        """A regular file of the folder itself."""
        if not isinstance(name, str) or Path(name).name != name:
            raise self._complaint(f"points at {name!r}, not at a file in it")
        path = self.path / name
        if path.is_symlink():
            raise self._complaint(f"{name}: a symbolic link; copy the folder with its files")
        if not path.is_file():
            raise self._complaint(f"has no {name}")
        return path

    def _weight_files(self) -> dict[str, Path]:
        """Path of the weight file that holds each tensor, by tensor name."""
        if (self.path / INDEX).exists():
            weights = self._json(INDEX).get("weight_map")
            if not isinstance(weights, dict):
                raise self._complaint(f"{INDEX}: has no weight_map")
            files = {name: self._inside(file) for name, file in weights.items()}
            for file in sorted(set(files.values())):
                held = self._names_in(file)
                for name in sorted({n for n, f in files.items() if f == file} ^ held):
                    raise self._complaint(f"tensor {name}: {INDEX} and {file.name} disagree")
            return files
        if not (self.path / SINGLE_FILE).exists():
            found = [p.name for p in sorted(self.path.glob("*.bin"))]
            pickles = f"; {found[0]} is a pickle, which is not read" if found else ""
            raise self._complaint(f"has no {SINGLE_FILE}{pickles}")
        file = self._inside(SINGLE_FILE)
        return dict.fromkeys(sorted(self._names_in(file)), file)

    def _names_in(self, file: Path) -> set[str]:
        try:
            with safe_open(file, framework="pt") as tensors:
                return set(tensors.keys())
        except (SafetensorError, OSError) as error:
            # Only now: a good file begins with its header's length, which may be the same bytes.
            what = "a pickle under another name; refused" if _is_pickle(file) else f"unreadable: {error}"
            raise self._complaint(f"{file.name}: {what}") from error

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """SHA-256 of the folder's tokenizer.json; None if the folder has no tokenizer."""
        path = self.path / TOKENIZER_FILE
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    def _checked(
        self, files: Mapping[str, Path], stored: Mapping[str, str], model: ModelConfig, vocabulary: Vocabulary
    ) -> FolderWeights:
        """Tensors of safetensors files by public name; InputError unless they are those of the model.

        Args:
            files: file of each tensor, by its name in there.
            stored: name in the files of each tensor, by its public name.
            model: model configuration that gives the expected shapes.
            vocabulary: vocabulary of the model.

        Returns:
            Tensors, read when asked for.
        """
        with ExitStack() as stack:
            opened = {
                file: stack.enter_context(safe_open(file, framework="pt")) for file in set(files.values())
            }
            held = {name: opened[files[own]].get_slice(own) for name, own in stored.items()}
            found = {name: tuple(each.get_shape()) for name, each in held.items()}
            self._refuse_misfits(found, stored, model, vocabulary)
            for name, each in held.items():
                if (dtype := each.get_dtype()) not in FLOATS:
                    raise self._complaint(f"tensor {stored[name]} is {dtype}, not one of {', '.join(FLOATS)}")
        return FolderWeights(files, stored)

    def _refuse_misfits(
        self,
        found: Mapping[str, tuple[int, ...]],
        stored: Mapping[str, str],
        model: ModelConfig,
        vocabulary: Vocabulary,
    ) -> None:
        """Refuse shapes, by public name, that are not those of the model; `stored`: their own names."""
        shapes = public_shapes(model, vocabulary.size)
        for name in sorted(shapes.keys() ^ found.keys()):
            what = "lacks" if name in shapes else "has an unknown"
            raise self._complaint(f"{what} tensor {stored.get(name, name)}")
        for name, shape in shapes.items():
            if found[name] != tuple(shape):
                raise self._complaint(f"tensor {stored[name]} has shape {found[name]}, not {tuple(shape)}")


class ExportedFolder(WeightFolder):
    """An exported folder; everything except the weights is checked on opening."""

    def __init__(self, path: Path) -> None:
        """Open the folder.

        Args:
            path: directory written by `megatron-dlm export`.

        Raises:
            InputError: the folder does not exist, holds another architecture, has weights in pickles or
                outside the folder, or has files that differ from its export report.
        """
        super().__init__(path)
        if (found := self.config.get("model_type")) != MODEL_TYPE:
            raise self._complaint(f"{CONFIG}: model_type {found!r} is not {MODEL_TYPE!r}")
        self._files = self._weight_files()
        self._refuse_altered()

    def _refuse_altered(self) -> None:
        """Compare code and configuration with the report, if there is one."""
        self._refuse_unlike(lambda name: not name.endswith(WEIGHT_SUFFIX))

    def refuse_altered_weights(self) -> None:
        """Compare the weights with the report, if there is one; reads all of them.

        Raises:
            InputError: a file is not the one that was verified.
        """
        self._refuse_unlike(lambda name: name.endswith(WEIGHT_SUFFIX))

    @property
    def is_saved_again(self) -> bool:
        """Whether transformers has saved the folder since it was exported, perhaps with other weights."""
        return (self.path / REPORT).exists() and self._json(REPORT).get("saved_again") is True

    def _refuse_unlike(self, compared: Callable[[str], bool]) -> None:
        if not (self.path / REPORT).exists() or self.is_saved_again:
            return
        expected = self._json(REPORT).get("sha256")
        if not isinstance(expected, dict):
            raise self._complaint(f"{REPORT}: has no sha256")
        code = {path.name for path in self.path.glob("*.py")}
        for name in filter(compared, sorted(code | expected.keys())):
            if name not in expected or sha256_of(self._inside(name)) != expected[name]:
                raise self._complaint(f"{name}: not the file that was verified when this was exported")

    @property
    def record(self) -> dict[str, Any]:
        """Record of the run that was exported."""
        return self._json(RUN)

    def refuse_other(self, model: ModelConfig, vocabulary: Vocabulary) -> None:
        """Refuse a folder whose model shape or vocabulary differs; the family may differ.

        Args:
            model: expected model configuration.
            vocabulary: expected vocabulary.

        Raises:
            InputError: a field differs, or tensors are missing, unknown or of another shape.
        """
        for name, wanted in shape_fields(model, vocabulary).items():
            if self.config.get(name) != wanted:
                raise self._complaint(f"{CONFIG}: {name} {self.config.get(name)!r} differs from {wanted!r}")
        self.weights(model, vocabulary)

    def weights(self, model: ModelConfig, vocabulary: Vocabulary) -> FolderWeights:
        """The tensors, read when asked for.

        Args:
            model: model configuration that gives the expected shapes.
            vocabulary: vocabulary of the model.

        Returns:
            Tensors by name.

        Raises:
            InputError: tensors are missing, unknown, of another shape or not of floating-point numbers.
        """
        own = {name: name for name in self._files}
        return self._checked(self._files, own, model, vocabulary)


def _is_pickle(file: Path) -> bool:
    """Whether a file that is not safetensors begins as torch.save's archives or plain pickles do."""
    with file.open("rb") as opened:
        start = opened.read(2)
    return any(start.startswith(first) for first in PICKLE_STARTS)


class FolderWeights(Mapping[str, Tensor]):
    """Tensors of safetensors files by public name, each read when asked for."""

    def __init__(self, files: Mapping[str, Path], stored: Mapping[str, str]) -> None:
        """`files`: of each tensor, by its name in there; `stored`: that name, by the public one."""
        self._files, self._stored = files, stored

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        with safe_open(self._files[stored], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(stored)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
