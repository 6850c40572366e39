#!/usr/bin/env bash
# Test under Slurm, one task per GPU.
#   [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS=...] \
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]
exec bash "$(dirname "${BASH_SOURCE[0]}")/slurm.sh" test 2 "$@"
