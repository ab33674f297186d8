#!/usr/bin/env bash
# Format, lint, types, docstrings, import direction: run before every commit. Needs the extra `dev`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
"$python" -m ruff format --check --quiet .
"$python" -m ruff check --quiet .
"$python" -m mypy
# pydoclint and tyro bring different packages that are both imported as docstring_parser.
pydoclint=${MEGATRON_DLM_PYDOCLINT:-.venv-pydoclint}
if [[ ! -x $pydoclint/bin/pydoclint ]]; then
    "$python" -m venv "$pydoclint"
    "$pydoclint/bin/python" -m pip install --quiet --disable-pip-version-check pydoclint==0.12.0
fi
"$pydoclint/bin/pydoclint" --quiet megatron_dlm examples/quickstart.py
site=$(mktemp -d)
NO_MKDOCS_2_WARNING=1 "$python" -m mkdocs build --quiet --site-dir "$site"
rm -r "$site"
"$python" -m pytest -q -p no:cacheprovider tests/unit/test_layering.py
if command -v shellcheck >/dev/null; then
    shellcheck examples/*.sh examples/*/*.sh tools/*.sh tests/run.sh .ci/run
fi
