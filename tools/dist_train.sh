#!/usr/bin/env bash
# Train with several processes, one per GPU; without GPUs on the CPU.
#   tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# If a process dies: MAX_RESTARTS=3 tools/dist_train.sh CONFIG GPUS --resume starts all again.
# Several machines: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 [PORT=29500] tools/dist_train.sh ...
exec bash "$(dirname "${BASH_SOURCE[0]}")/dist.sh" train 1 "$@"
