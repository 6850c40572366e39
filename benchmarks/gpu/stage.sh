#!/usr/bin/env bash
# Collect into .gpu/ what a GPU machine without a network lacks.
#
#   DATA=FOLDER benchmarks/gpu/stage.sh           FOLDER holds bccd/ (COCO's layout) and camvid/ (ADE20K's)
#
# The machine has to have the Python and torch named below, CUDA's nvcc, ninja, pytest, matplotlib, scipy and OpenCV.
#   .gpu/wheels/   the forks of OpenMMLab, as pinned in requirements/, and what they need
#   .gpu/sdist/    mmcv's sources
#   .gpu/mmcv/     mmcv, compiled for the GPU; compiled here if it is not there. BUILD=0 leaves it to the machine
#   .gpu/data/     the images
# Whatever is there already is kept: remove .gpu/ to begin again. OFFICIAL=FOLDER takes the authors'
# pvt.py and pvt_v2.py from their folder detection/ for the comparison of speed.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3.12}
TORCH=${TORCH:-2.11.0}       # on the GPU machine, built for CUDA $CUDA
CUDA=${CUDA:-13.0}
ARCH=${TORCH_CUDA_ARCH_LIST:-9.0}
LIMIT_MB=${LIMIT_MB:-64}     # what travels: this folder and the working tree
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/pvt_mm
ENV=$CACHE/gpu-torch$TORCH   # an environment like the machine's, to compile in and to rehearse
PLATFORMS=$(printf -- '--platform manylinux_2_%s_x86_64 ' 28 27 24 17 5; echo --platform manylinux2014_x86_64)

say() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }
pinned() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" requirements/common.txt requirements/onedl.txt | head -n 1; }
pip() { "$ENV/bin/python" -m pip -q --disable-pip-version-check --no-input "$@"; }

mkdir -p .gpu/wheels .gpu/sdist .gpu/mmcv .gpu/data .gpu/official
if [ ! "$ENV/ready" -nt benchmarks/gpu/machine.txt ]; then
    say "an environment with torch $TORCH for CUDA $CUDA in $ENV"
    rm -rf "$ENV"
    "$PYTHON" -m venv "$ENV"
    pip install -r benchmarks/gpu/machine.txt "torch==$TORCH" \
        "nvidia-cuda-nvcc==$CUDA.*" "nvidia-cuda-crt==$CUDA.*" "nvidia-nvvm==$CUDA.*" "nvidia-cuda-cccl==$CUDA.*"
    # nvcc's packages as a CUDA toolkit: torch links with lib64/libcudart.so.
    toolkit=$("$ENV/bin/python" -c 'import pathlib, nvidia; print(*pathlib.Path(nvidia.__path__[0]).glob("cu[0-9]*"))')
    mkdir -p "$ENV/cuda/lib64"
    ln -s "$toolkit/bin" "$toolkit/include" "$toolkit/nvvm" "$ENV/cuda/"
    ln -s "$toolkit"/lib/lib* "$ENV/cuda/lib64/"
    ln -sf "$(compgen -G "$toolkit/lib/libcudart.so.*")" "$ENV/cuda/lib64/libcudart.so"
    touch "$ENV/ready"
fi

# Those that are pure Python come as sources, and pip builds them; the others are taken for the machine's Python.
for name in onedl-mmengine onedl-mmdetection onedl-mmsegmentation; do
    compgen -G ".gpu/wheels/${name//-/_}-$(pinned "$name")-*.whl" >/dev/null && continue
    say "$name $(pinned "$name")"
    pip wheel --no-deps -w .gpu/wheels "$name==$(pinned "$name")"
done
for name in addict faster-coco-eval ftfy imaug platformdirs prettytable pycocotools shapely termcolor terminaltables wcwidth yapf
do
    compgen -G ".gpu/wheels/${name//-/_}-$(pinned "$name")-*.whl" >/dev/null && continue
    say "$name $(pinned "$name")"
    # shellcheck disable=SC2086
    pip download --no-deps --only-binary=:all: --implementation cp $PLATFORMS -d .gpu/wheels "$name==$(pinned "$name")" \
        --python-version "$("$ENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
done
version=$(pinned onedl-mmcv)
if ! compgen -G ".gpu/sdist/onedl_mmcv-$version.tar.gz" >/dev/null; then
    say "onedl-mmcv $version, sources"
    pip download --no-deps --no-build-isolation --no-binary onedl-mmcv -d .gpu/sdist "onedl-mmcv==$version"
fi
if [ "${BUILD:-1}" = 1 ] && ! compgen -G ".gpu/mmcv/onedl_mmcv-$version-*" >/dev/null; then
    cached=$CACHE/mmcv$version-gpu-torch$TORCH-cuda$CUDA-sm$ARCH
    if ! compgen -G "$cached/*.whl" >/dev/null; then
        say "onedl-mmcv $version: compiling it for CUDA $CUDA, sm $ARCH, log in $ENV/mmcv.log (10 to 20 minutes of two cores)"
        PATH=$ENV/bin:$PATH PYTHON=$ENV/bin/python CUDA_HOME=$ENV/cuda TORCH_CUDA_ARCH_LIST=$ARCH \
            benchmarks/gpu/build_mmcv.sh ".gpu/sdist/onedl_mmcv-$version.tar.gz" "$cached.part" >"$ENV/mmcv.log" 2>&1
        mv "$cached.part" "$cached"
    fi
    cp "$cached"/*.whl .gpu/mmcv/
fi
if [ -n "${DATA:-}" ]; then
    for name in bccd camvid; do
        [ -d ".gpu/data/$name" ] || { say "images: $name"; cp -r "$DATA/$name" .gpu/data/; chmod -R u+w ".gpu/data/$name"; }
    done
fi
if [ -n "${OFFICIAL:-}" ]; then cp "$OFFICIAL"/pvt*.py .gpu/official/; fi

tree=$(git ls-files -co --exclude-standard -z | du -cB1 --apparent-size --files0-from=- | tail -n 1 | cut -f 1)
staged=$(du -sB1 --apparent-size .gpu | cut -f 1)
say ".gpu: $((staged >> 20)) MiB, working tree: $((tree >> 20)) MiB"
du -sh --apparent-size .gpu/*
[ $(((staged + tree) >> 20)) -lt "$LIMIT_MB" ] ||
    { echo "stage: more than $LIMIT_MB MiB (LIMIT_MB) would travel; leave out a folder of .gpu/data" >&2; exit 1; }
for name in bccd camvid; do
    [ -d ".gpu/data/$name" ] || say "without $name: pass DATA=FOLDER to train on it there"
done
