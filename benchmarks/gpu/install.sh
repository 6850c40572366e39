#!/usr/bin/env bash
# Install what stage.sh has collected beside the machine's own packages: install.sh STAGED SITE OUT
#
# Of mmcv it tries a wheel, the parts of one that an earlier visit has brought back, and compiling the sources, until
# its operators work on the device. A wheel that is compiled here goes to OUT in parts of 15 MB: copy them to
# .gpu/mmcv/ for the next visit.
set -uo pipefail
STAGED=$1 SITE=$2 OUT=$3
PYTHON=${PYTHON:-python3}
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT

install() {
    "$PYTHON" -m pip --disable-pip-version-check install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" "$@"
}
install_mmcv() {
    echo "installing $(basename "$1")"
    install "$1" && "$PYTHON" -m benchmarks.gpu.check_ops
}

rm -rf "$SITE"
install "$STAGED"/wheels/*.whl || exit 1
for wheel in "$STAGED"/mmcv/*.whl; do
    [ -f "$wheel" ] && install_mmcv "$wheel" && exit 0
done
for first in "$STAGED"/mmcv/*.whl.part-aa; do
    [ -f "$first" ] || continue
    wheel=$FOLDER/$(basename "${first%.part-aa}")
    cat "${first%aa}"?? >"$wheel"
    install_mmcv "$wheel" && exit 0
done
echo 'compiling mmcv'
MAX_JOBS=$(nproc) bash benchmarks/gpu/build_mmcv.sh "$STAGED"/sdist/onedl_mmcv-*.tar.gz "$FOLDER/built" || exit 1
wheel=$(compgen -G "$FOLDER/built/*.whl") || exit 1
split -b 15M "$wheel" "$OUT/$(basename "$wheel").part-"
install_mmcv "$wheel"
