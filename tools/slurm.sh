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
partition=$1 name=$2
shift 2
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
options=() resume=()
if [ "$tool" = train ]; then
    # Before its time is over, training saves a checkpoint and ends with 128 + 10, for SIGUSR1.
    options=(--signal "USR1@${SECONDS_TO_SAVE:-120}")
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
        resume=(--resume)
    fi
fi
while :; do
    code=0
    # SRUN_ARGS is a list of words on purpose. An empty array is an error in older versions of bash.
    # shellcheck disable=SC2086
    srun --partition "$partition" --job-name "$name" --ntasks "$gpus" --ntasks-per-node "$per_node" \
        --gres "gpu:$per_node" --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
        ${options[@]+"${options[@]}"} ${SRUN_ARGS:-} \
        "${PYTHON:-python}" -u "$(cd "$(dirname "$0")" && pwd)/$tool.py" "$@" \
        ${resume[@]+"${resume[@]}"} --launcher slurm || code=$?
    if [ "$tool" != train ] || [ "$code" != 138 ]; then
        exit "$code"
    fi
    if [ -n "${SLURM_JOB_ID:-}" ]; then # in a batch job, which Slurm starts again
        exec scontrol requeue "$SLURM_JOB_ID"
    fi
    echo "slurm_train.sh: the time of the job is over; the rest of the training is queued." >&2
    resume=(--resume)
done
