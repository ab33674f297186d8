#!/usr/bin/env bash
# Runs the container's command; with MEGATRON_DLM_DOCTOR=1 only after a quick look at software and machine.
set -euo pipefail
if [[ ${MEGATRON_DLM_DOCTOR:-0} == 1 ]]; then
    megatron-dlm doctor --quick
fi
exec "$@"
