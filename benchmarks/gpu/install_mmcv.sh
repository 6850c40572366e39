#!/usr/bin/env bash
# Install mmcv with operators that work on the device: install_mmcv.sh STAGED SITE OUT
#
# Tried in turn: a wheel, the parts of one that an earlier visit has brought back, compiling the sources. A wheel that
# is compiled here goes to OUT in parts of 15 MB: copy them to .gpu/mmcv/ for the next visit.
set -uo pipefail
STAGED=$1 SITE=$2 OUT=$3
PYTHON=${PYTHON:-python3}
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT

install() {
    echo "installing $(basename "$1")"
    "$PYTHON" -m pip --disable-pip-version-check install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" "$1" &&
        "$PYTHON" -m benchmarks.gpu.check_ops
}

for wheel in "$STAGED"/mmcv/*.whl; do
    [ -f "$wheel" ] && install "$wheel" && exit 0
done
for first in "$STAGED"/mmcv/*.whl.part-aa; do
    [ -f "$first" ] || continue
    wheel=$FOLDER/$(basename "${first%.part-aa}")
    cat "${first%aa}"?? >"$wheel"
    install "$wheel" && exit 0
done
echo 'compiling mmcv'
MAX_JOBS=$(nproc) bash benchmarks/gpu/build_mmcv.sh "$STAGED"/sdist/onedl_mmcv-*.tar.gz "$FOLDER/built" || exit 1
wheel=$(compgen -G "$FOLDER/built/*.whl") || exit 1
split -b 15M "$wheel" "$OUT/$(basename "$wheel").part-"
install "$wheel"
