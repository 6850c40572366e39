#!/usr/bin/env bash
# srun around tools/TOOL.py; called by slurm_train.sh and slurm_test.sh.
#   slurm.sh TOOL N PARTITION JOB_NAME FIRST..N-TH ARGUMENT [more arguments]
set -euo pipefail
tool=$1 n=$2
shift 2
if [ $# -lt $((n + 2)) ]; then
    sed -n '4s/^# *//p' "$(dirname "$0")/slurm_$tool.sh" >&2
    exit 2
fi
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
# SRUN_ARGS is a list of words on purpose.
# shellcheck disable=SC2086
exec srun --partition "$1" --job-name "$2" --ntasks "$gpus" --ntasks-per-node "$per_node" \
    --gres "gpu:$per_node" --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(cd "$(dirname "$0")" && pwd)/$tool.py" "${@:3}" --launcher slurm
