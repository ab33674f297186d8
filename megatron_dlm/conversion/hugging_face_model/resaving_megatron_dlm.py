"""Files of an export that go along when transformers saves the model again."""

import json
import shutil
from pathlib import Path

from transformers.utils import cached_file

REPORT = "export_report.json"
COPIED = ("megatron_dlm_run.json", "check.json", "check.safetensors")


def copy_export_files(source, directory):
    """Copy what transformers leaves out; the report then says that the weights may have changed since.

    Args:
        source: folder, or repository of the Hugging Face Hub, that the model was loaded from; may be neither.
        directory: folder that the model was saved to.
    """
    target = Path(directory)
    report_file = _file_of(source, REPORT)
    report = json.loads(report_file.read_text(encoding="utf-8")) if report_file else {}
    original = report.get("original", report)
    code = [name for name in original.get("sha256", {}) if name.endswith(".py")]
    for name in (*COPIED, *code):
        path = _file_of(source, name)
        if path is not None and path.resolve() != (target / name).resolve():
            shutil.copyfile(path, target / name)
    if report:
        text = json.dumps({"saved_again": True, "original": original}, indent=2) + "\n"
        (target / REPORT).write_text(text, encoding="utf-8")


def _file_of(source, name):
    """Path of a file of the export, or None."""
    if not source:
        return None
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(cached_file(source, name))
    except OSError:
        # No such file there, or no such repository.
        return None
