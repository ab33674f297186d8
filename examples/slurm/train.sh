#!/usr/bin/env bash
# Start any recipe with Slurm: one task per GPU through srun; the run saves and requeues before its time ends.
#
#   sbatch -N 16 --gpus-per-node 8 --ntasks-per-node 8 examples/slurm/train.sh RECIPE [--field.name VALUE ...]
#   examples/slurm/train.sh --dry-run RECIPE ...        prints command and layout without Slurm
#   sbatch ... examples/slurm/train.sh --check RECIPE ...   megatron-dlm doctor looks at all nodes first
# CONTAINER_IMAGE (an Enroot image, or REGISTRY#NAME:TAG) runs the tasks in a container by Pyxis; CONTAINER_MOUNTS are
# its mounts (SOURCE:TARGET,...; default: the working directory at the same path).
# Outside Slurm the dry run takes NUM_NODES and GPUS_PER_NODE (default 1 and 1). PYTHON is the interpreter
# with megatron-dlm installed, seen from every node. A preset MASTER_ADDR or MASTER_PORT is kept.
# (sbatch runs a copy of this script, so it reads no other file.)
#SBATCH --job-name=megatron-dlm
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --output=slurm-%j.log
set -euo pipefail
dry_run=false check=false
case ${1:-} in
--dry-run) dry_run=true && shift ;;
--check) check=true && shift ;;
esac
if [[ $# -eq 0 ]]; then
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
fi
python=${PYTHON:-python}
# srun hands USR1 (sent 120 s before the time limit) to the tasks, which save and end with exit code 3.
# One rank that fails must not leave the others waiting; a save in progress has a minute to end.
container=()
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    container=(--container-image "$CONTAINER_IMAGE" --container-mounts "${CONTAINER_MOUNTS:-$PWD:$PWD}"
        --container-workdir "$PWD")
fi
launch=(srun --kill-on-bad-exit=0 --wait=60 "${container[@]}" "$python" -m megatron_dlm)
command=("${launch[@]}" train "$@")
if $dry_run; then
    tasks=${SLURM_NTASKS:-$((${NUM_NODES:-1} * ${GPUS_PER_NODE:-1}))}
    printf '%q ' "${command[@]}"
    echo
    exec "$python" -m megatron_dlm train "$@" --dry-run "$tasks"
fi
if ! command -v srun >/dev/null; then
    echo "train.sh: error: srun: not found; this script is for sbatch, or --dry-run" >&2
    exit 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if $check; then
    "${launch[@]}" doctor "$@" --quick
fi
status=0
"${command[@]}" || status=$?
# After a signal, saved (3) or killed, and after a lost rank (4), but not after errors, and not more than three times
# without a new checkpoint.
# A node that is lost is Slurm's to requeue for (--requeue).
if [[ $status -ne 0 ]] && srun --nodes 1 --ntasks 1 "${container[@]}" "$python" -m megatron_dlm.cli.requeue "$status" "$@"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
