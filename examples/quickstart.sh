#!/usr/bin/env bash
# The whole way on one machine without a GPU: text, tokenizer, shards, training on two processes, a stop and a
# resume, evaluation, Hugging Face export, generated text. Installs everything into .venv of this checkout.
#
#   examples/quickstart.sh [--objective mdlm|ar] [--data FILE.jsonl|FILE.txt] [--output DIRECTORY]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("$root/tools/install.sh" cpu hf eval)
PATH=$(dirname "$python"):$PATH exec "$python" "$root/examples/quickstart.py" "$@"
