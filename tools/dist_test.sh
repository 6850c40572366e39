#!/usr/bin/env bash
# Test with several processes, one per GPU; without GPUs on the CPU.
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
# Several machines: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 [PORT=29500] tools/dist_test.sh ...
exec bash "$(dirname "${BASH_SOURCE[0]}")/dist.sh" test 2 "$@"
