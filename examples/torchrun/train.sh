#!/usr/bin/env bash
# Start any recipe with torchrun, on one node or on many.
#
#   examples/torchrun/train.sh [--dry-run] RECIPE [--field.name VALUE ...]
#
# On many nodes run it once per node (pdsh, a scheduler, by hand) with the same MASTER_ADDR and NUM_NODES:
#   NUM_NODES       nodes of the job (default 1)
#   NODE_RANK       this node, 0 .. NUM_NODES-1 (default 0)
#   GPUS_PER_NODE   processes per node (default: GPUs of this node, or 1 without any)
#   MASTER_ADDR, MASTER_PORT   where rank 0 listens (default 127.0.0.1, 29500)
#   PYTHON          interpreter with megatron-dlm installed (default python)
set -euo pipefail
dry_run=false
if [[ ${1:-} == --dry-run ]]; then
    dry_run=true
    shift
fi
if [[ $# -eq 0 ]]; then
    sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
fi
python=${PYTHON:-python}
gpus=0
if command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus | wc -l)
fi
# torchrun forwards only these to the workers; USR1 would otherwise kill it and leave them behind.
signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
# Under nohup a terminal that closes is to be ignored, by torchrun too.
if [[ $(trap -p SIGHUP) != "trap -- ''"* ]]; then
    signals+=,SIGHUP
fi
nodes=${NUM_NODES:-1}
if [[ $nodes -gt 1 && -z ${MASTER_ADDR:-} ]]; then
    echo "train.sh: error: MASTER_ADDR: not set; $nodes nodes need the address of node 0" >&2
    exit 2
fi
per_node=${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
command=("$python" -m torch.distributed.run
    --nnodes "$nodes" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$per_node"
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}"
    --signals-to-handle "$signals"
    -m megatron_dlm train "$@")
if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
    exec "$python" -m megatron_dlm train "$@" --dry-run "$((nodes * per_node))"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${command[@]}"
