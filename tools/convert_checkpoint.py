r"""Convert checkpoints with the arguments of Megatron-LM's tools/checkpoint/convert.py.

    python tools/convert_checkpoint.py --loader megatron --saver hugging-face \
        --load-dir runs/first@1000 --save-dir exported

Does what `megatron-dlm export` and `megatron-dlm import` do. Layouts are no matter: a checkpoint of any
tensor, pipeline, context or data parallel size is read, and what is written loads at any.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_dlm.checkpointing.layout import REFERENCE_SUFFIX
from megatron_dlm.cli.main import run_and_exit, with_home
from megatron_dlm.interfaces import InputError

FORMATS = ("megatron", "hugging-face", "reference")


def main() -> None:
    """Parse and convert."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Further arguments are passed on, for example --dtype bf16 or --recipe FILE --tokenizer DIR.",
    )
    parser.add_argument("--loader", choices=FORMATS, required=True, help="what --load-dir is")
    parser.add_argument("--saver", choices=FORMATS, required=True, help="what --save-dir becomes")
    parser.add_argument("--load-dir", type=Path, required=True, help="run, RUN@STEP, folder or .ckpt file")
    parser.add_argument("--save-dir", type=Path, required=True, help="folder, or .ckpt file, to make")
    arguments, more = parser.parse_known_args(with_home(sys.argv[1:]))
    run_and_exit("convert_checkpoint", lambda: convert(arguments, more))


def convert(arguments: argparse.Namespace, more: list[str]) -> int:
    """Call the verb for this direction; returns its exit code."""
    if (arguments.loader == "megatron") == (arguments.saver == "megatron"):
        raise InputError(
            f"loader, saver: {arguments.loader} to {arguments.saver}; just one of them must be megatron"
        )
    for side, path in ((arguments.loader, arguments.load_dir), (arguments.saver, arguments.save_dir)):
        if (side == "reference") != (path.suffix == REFERENCE_SUFFIX):
            raise InputError(f"{path}: only a reference checkpoint ends in {REFERENCE_SUFFIX}")
    verb = "export" if arguments.loader == "megatron" else "import"
    # A keyword of Python is no name for an import statement.
    command: Any = import_module(f"megatron_dlm.cli.{verb}")
    code: int = command.run([str(arguments.load_dir), str(arguments.save_dir), *more])
    return code


if __name__ == "__main__":
    main()
