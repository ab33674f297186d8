"""Parses command-line arguments into dataclasses and reports every error as one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import docstring_parser
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from megatron_dlm.interfaces import InputError

T = TypeVar("T")
M = TypeVar("M", bound="ModelArgument")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgument:
    """The trained model that a command uses."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run's directory, which means its newest checkpoint, RUN@STEP, a checkpoint directory (step-NNNNNNNN)
    saved in any parallel layout, or an exported folder."""
    step: int | None = None
    """Step of the checkpoint if MODEL is a run's directory; None: the newest complete one."""


def parse_with_model(declared: type[M], arguments: Sequence[str], *, verb: str) -> M:
    """Parse arguments whose model may be named as a run.

    Args:
        declared: a dataclass with a model.
        arguments: command-line arguments.
        verb: name of the command, shown in the usage line.

    Returns:
        The instance, whose model is a checkpoint's directory or an exported folder, and whose step is None.

    Raises:
        InputError: as `parse`; the run has no such checkpoint.
    """
    config = parse(declared, arguments, verb=verb)
    from megatron_dlm.run.checkpoint_names import find_checkpoint

    return dataclasses.replace(config, model=find_checkpoint(config.model, config.step), step=None)


def parse(declared: type[T], arguments: Sequence[str], *, verb: str, default: T | None = None) -> T:
    """An instance of `declared` from `--field value` arguments.

    Args:
        declared: a frozen dataclass.
        arguments: command-line arguments.
        verb: name of the command, shown in the usage line.
        default: values that the arguments override; None: required fields must be given.

    Returns:
        The instance.

    Raises:
        InputError: unknown or missing argument, or a value of the wrong type or range.
    """
    complaint = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: T = tyro.cli(
                declared,
                args=list(arguments),
                prog=f"megatron-dlm {verb}",
                config=(tyro.conf.AvoidSubcommands,),
                registry=_flowing_help(),
                **options,
            )
            return parsed
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_one_line(complaint.getvalue())) from None


def _flowing_help() -> ConstructorRegistry:
    """Fields with their docstrings as one paragraph; tyro itself keeps the line breaks of indented ones."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def dataclass_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type):
            return None
        hints = get_type_hints(info.type, include_extras=True)

        helps = _paragraphs(info.type)

        def default_of(field: dataclasses.Field[Any]) -> Any:
            if isinstance(info.default, info.type):
                return getattr(info.default, field.name)
            if field.default_factory is not dataclasses.MISSING:
                return field.default_factory()
            return tyro.MISSING if field.default is dataclasses.MISSING else field.default

        fields = (
            StructFieldSpec(field.name, hints[field.name], default_of(field), helps.get(field.name))
            for field in dataclasses.fields(info.type)
        )
        return StructConstructorSpec(instantiate=info.type, fields=tuple(fields))

    return registry


@cache
def _paragraphs(declared: type) -> dict[str, str]:
    """Docstrings of a dataclass's fields, its base classes' included, without line breaks."""
    return {
        param.arg_name: " ".join((param.description or "").split())
        for base in reversed(declared.__mro__)
        if base is not object
        for param in docstring_parser.parse_from_object(base).params
    }


def check_new_file(name: str, path: Path | None) -> None:
    """Check that an output file can be written, before the work that produces it.

    Args:
        name: name of the argument.
        path: file to be written; None: no file is written.

    Raises:
        InputError: the directory of `path` does not exist, or `path` is a directory.
    """
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{name}: {path.parent}: no such directory")
    if path is not None and path.is_dir():
        raise InputError(f"{name}: {path} is a directory")


@contextlib.contextmanager
def bad_values() -> Iterator[None]:
    """Turn ValueError into InputError: code that is copied into exports cannot raise InputError itself."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def _one_line(panel: str) -> str:
    """The words of tyro's error panel without its frame and its pointer to --help."""
    words = "".join(" " if character in "│╭╮╰╯─" else character for character in panel).split()
    text = " ".join(words)
    text = text.split("For full helptext")[0].removeprefix("Parsing error").strip()
    # The panel's title repeats its text.
    text = text.removeprefix("Unrecognized options ")
    # Our own InputError, raised while a section was built, already names its field.
    return re.sub(r"^Value error Error parsing \S+: ", "", text)
