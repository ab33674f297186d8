#!/usr/bin/env bash
# Start any recipe with torchrun, on one node or on many.
#
#   examples/torchrun/train.sh [--dry-run | --check] RECIPE [--field.name VALUE ...]
#
# --check has megatron-dlm doctor look at all processes' machines and at the recipe before they train.
#
# On many nodes run it once per node (pdsh, a scheduler, by hand) with the same MASTER_ADDR and NUM_NODES:
#   NUM_NODES       nodes of the job (default 1); 2:4 is an elastic job that starts with 2 to 4 nodes, goes on
#                   with the others if one is lost or gets a signal, and takes up a node that is started later
#   NODE_RANK       this node, 0 .. NUM_NODES-1 (default 0)
#   GPUS_PER_NODE   processes per node (default: GPUs of this node, or 1 without any)
#   MASTER_ADDR, MASTER_PORT   where node 0 listens (default: a free port of this node; 29500 on many nodes)
#   MAX_RESTARTS    of an elastic job, starts in a row after losses without a new checkpoint (default 3)
#   JOB_ID          of an elastic job, its name, where several meet at one address (default megatron-dlm)
#   RDZV_CONF       of an elastic job, further --rdzv-conf, such as last_call_timeout=30: seconds to wait for more
#                   nodes when the fewest have met
#   PYTHON          interpreter with megatron-dlm installed (default python)
set -euo pipefail
dry_run=false check=false
case ${1:-} in
--dry-run) dry_run=true && shift ;;
--check) check=true && shift ;;
esac
if [[ $# -eq 0 ]]; then
    sed -n '2,19s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
fi
python=${PYTHON:-python}
gpus=0
if command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus | wc -l)
fi
nodes=${NUM_NODES:-1}
if ! [[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]]; then
    echo "train.sh: error: NUM_NODES: $nodes is neither a number nor FEWEST:MOST" >&2
    exit 2
fi
most_nodes=${nodes#*:}
if [[ ${nodes%:*} -gt $most_nodes ]]; then
    echo "train.sh: error: NUM_NODES: $nodes: the fewest nodes are more than the most" >&2
    exit 2
fi
if [[ $most_nodes -gt 1 && -z ${MASTER_ADDR:-} ]]; then
    echo "train.sh: error: MASTER_ADDR: not set; $most_nodes nodes need the address of node 0" >&2
    exit 2
fi
per_node=${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
if [[ $nodes == *:* ]]; then
    # Whose address MASTER_ADDR is cannot be told from a name, so node 0 is told.
    is_host=$((${NODE_RANK:-0} == 0))
    meeting=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-id "${JOB_ID:-megatron-dlm}"
        --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}"
        --rdzv-conf "is_host=$is_host${RDZV_CONF:+,$RDZV_CONF}" --max-restarts "${MAX_RESTARTS:-3}")
    set -- "$@" --parallel.idle-ranks
elif [[ $nodes -eq 1 && -z ${MASTER_ADDR:-}${MASTER_PORT:-} ]]; then
    meeting=(--standalone --local-addr 127.0.0.1)
else
    meeting=(--nnodes "$nodes" --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}")
fi
# torchrun's own arguments, with signals passed on until the run is saved and the run's exit code.
launch=("$python" -m megatron_dlm.cli.torchrun "${meeting[@]}" --nproc-per-node "$per_node" -m megatron_dlm)
command=("${launch[@]}" train "$@")
if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
    exec "$python" -m megatron_dlm train "$@" --dry-run "$((most_nodes * per_node))"
fi
if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    exec "$python" -m megatron_dlm train "$@"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# What cannot run is refused here, once, before the processes start.
for count in $(printf '%s\n' "${nodes%:*}" "$most_nodes" | uniq); do
    "$python" -m megatron_dlm train "$@" --check "$((count * per_node))"
done
if $check; then
    "${launch[@]}" doctor "$@" --quick
fi
exec "${command[@]}"
