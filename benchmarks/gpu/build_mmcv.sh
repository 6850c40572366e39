#!/usr/bin/env bash
# Compile mmcv's operators for a GPU, from a source distribution, into a wheel.
#
#   benchmarks/gpu/build_mmcv.sh SDIST OUT        PYTHON with torch and CUDA_HOME with nvcc; no GPU is needed
#
# dev/join_mmcv.py joins the C++ sources; a CUDA source is compiled as it is, MAX_JOBS of them at a time.
set -euo pipefail

ROOT=$(cd "$(dirname "$0")/../.." && pwd)
PYTHON=${PYTHON:-python3}
[ $# -eq 2 ] || { echo 'usage: benchmarks/gpu/build_mmcv.sh SDIST OUT' >&2; exit 2; }
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

"$PYTHON" -W ignore -m tarfile -e "$1" "$WORK"
"$PYTHON" "$ROOT/dev/join_mmcv.py" "$WORK"/*mmcv-*
# Python's own flags, which CFLAGS would replace, without debug symbols.
CFLAGS="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("CFLAGS") or "")') -g0"
export CFLAGS FORCE_CUDA=1 MMCV_WITH_OPS=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} MAX_JOBS=${MAX_JOBS:-$(nproc)}
"$PYTHON" -m pip --disable-pip-version-check wheel -v --no-build-isolation --no-cache-dir --no-deps -w "$2" "$WORK"/*mmcv-*
