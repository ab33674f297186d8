#!/usr/bin/env bash
# The runs of a scaling grid as a Slurm job array, a task of the array for each line of GRID/commands.txt.
#
#   sbatch --array 0-59%8 -N 1 --gpus-per-node 8 --ntasks-per-node 8 examples/slurm/array.sh GRID/commands.txt
#   SLURM_ARRAY_TASK_ID=3 examples/slurm/array.sh --dry-run GRID/commands.txt      prints one run's command
# Started in the repository's root. Each run saves and requeues as examples/slurm/train.sh does; a run that is
# finished ends at once, so the same command submits what is missing. Runs that branch from another come after
# it in the list: submit them with --dependency, or the whole array again.
#SBATCH --job-name=megatron-dlm-grid
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --output=slurm-%A-%a.log
set -euo pipefail
options=()
if [[ ${1:-} == --dry-run ]]; then
    options=(--dry-run)
    shift
fi
if [[ $# -ne 1 ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
fi
task=${SLURM_ARRAY_TASK_ID:-}
if [[ -z $task ]]; then
    echo "array.sh: error: SLURM_ARRAY_TASK_ID: not set; submit this script with sbatch --array" >&2
    exit 2
fi
mapfile -t commands <"$1"
if [[ $task -ge ${#commands[@]} ]]; then
    echo "array.sh: error: SLURM_ARRAY_TASK_ID: $task; $1 has ${#commands[@]} lines, 0 to $((${#commands[@]} - 1))" >&2
    exit 2
fi
# The line is quoted for a shell.
eval "words=(${commands[$task]})"
# shellcheck disable=SC2154  # words: set by eval
exec bash examples/slurm/train.sh "${options[@]}" "${words[@]}"
