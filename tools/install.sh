#!/usr/bin/env bash
# Make or update the virtual environment of this checkout: tools/install.sh [EXTRA ...] (extras of setup.py).
# Prints the path of its Python. MEGATRON_DLM_VENV chooses another place, PYTHON another interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MEGATRON_DLM_VENV:-$root/.venv}
extras=$(IFS=,; echo "$*")
stamp=$venv/.installed
wanted="$extras $(sha256sum <"$root/setup.py" | cut -c1-16)"
if ! grep -qsxF "$wanted" "$stamp"; then
    [[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv" >&2
    echo "installing megatron-dlm[$extras] into $venv" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root${extras:+[$extras]}" >&2
    echo "$wanted" >>"$stamp"
fi
echo "$venv/bin/python"
