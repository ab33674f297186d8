#!/usr/bin/env bash
# Start any recipe with mpirun (Open MPI), on one node or on many.
#
#   examples/mpi/train.sh [--dry-run | --check] RECIPE [--field.name VALUE ...]
#
# --check has megatron-dlm doctor look at all processes' machines and at the recipe before they train.
#   NUM_PROCESSES   processes of the job (default 1)
#   HOSTFILE        Open MPI host file; without it all processes run here
#   MASTER_ADDR     address of rank 0's node, needed with HOSTFILE; MASTER_PORT its port (default 29500)
#   MPIRUN_FLAGS    further mpirun flags, split at spaces (for example --allow-run-as-root --oversubscribe)
#   PYTHON          interpreter with megatron-dlm installed (default python)
# SIGUSR1 to mpirun reaches the processes, which save and stop; SIGTERM ends them unsaved.
set -euo pipefail
dry_run=false check=false
case ${1:-} in
--dry-run) dry_run=true && shift ;;
--check) check=true && shift ;;
esac
if [[ $# -eq 0 ]]; then
    sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
fi
python=${PYTHON:-python}
processes=${NUM_PROCESSES:-1}
read -ra flags <<<"${MPIRUN_FLAGS:-}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
command=(mpirun -n "$processes" ${HOSTFILE:+--hostfile "$HOSTFILE"} "${flags[@]}" -x OMP_NUM_THREADS)
for name in MASTER_ADDR MASTER_PORT; do
    [[ -z ${!name:-} ]] || command+=(-x "$name")
done
launch=("${command[@]}" "$python" -m megatron_dlm)
command=("${launch[@]}" train "$@")
if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
    exec "$python" -m megatron_dlm train "$@" --dry-run "$processes"
fi
if ! command -v mpirun >/dev/null; then
    echo "train.sh: error: mpirun: not found; load or install Open MPI, or take examples/torchrun/train.sh" >&2
    exit 2
fi
if $check; then
    "${launch[@]}" doctor "$@" --quick
fi
exec "${command[@]}"
