#!/usr/bin/env bash
# Train under Slurm, one task per GPU.
#   [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SECONDS_TO_SAVE=120 SRUN_ARGS=...] \
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of tools/train.py]
# When its time is over it goes on in the queue, with --resume: with `scontrol requeue` in a job of
# `sbatch --requeue`, else with another srun.
exec bash "$(dirname "${BASH_SOURCE[0]}")/slurm.sh" train 1 "$@"
