#!/usr/bin/env bash
# torchrun around tools/TOOL.py; called by dist_train.sh and dist_test.sh.
#   dist.sh TOOL N FIRST..N-TH ARGUMENT GPUS [more arguments]
set -euo pipefail
tool=$1 n=$2
shift 2
if [ $# -le "$n" ]; then
    sed -n '3s/^# *//p' "$(dirname "$0")/dist_$tool.sh" >&2
    exit 2
fi
files=("${@:1:n}")
gpus=${*:n+1:1}
if ! [[ $gpus =~ ^[1-9][0-9]*$ ]]; then
    echo "dist_$tool.sh: the number of processes is '$gpus', expected 1, 2, ..." >&2
    exit 2
fi
if [ "${NNODES:-1}" != 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
    echo "dist_$tool.sh: NNODES is '$NNODES' and MASTER_ADDR is not set;" \
        "on every machine set it to the address of the one with NODE_RANK=0." >&2
    exit 2
fi

if [ "${NNODES:-1}" = 1 ] && [ -z "${PORT:-}" ]; then
    rendezvous=(--standalone) # on a free port
else
    rendezvous=(
        --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${PORT:-29500}"
    )
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun's own default, without its warning
# A new store for each attempt, see pvt_mm/engine/group.py.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
tools=$(cd "$(dirname "$0")" && pwd)
exec "${PYTHON:-python}" "$tools/torchrun.py" "${rendezvous[@]}" --nproc-per-node "$gpus" \
    --max-restarts "${MAX_RESTARTS:-0}" \
    "$tools/$tool.py" "${files[@]}" --launcher pytorch "${@:n+2}"
