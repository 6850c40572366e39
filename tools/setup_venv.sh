#!/usr/bin/env bash
# Create or complete a virtual environment with one of the stacks in requirements/ and this project (editable).
#
#   tools/setup_venv.sh VENV [PYTHON]      PYTHON (default python3) is only used to create VENV
#
# STACK=onedl, the maintained forks, is the default, STACK=upstream the other; TORCH=2.1.2 puts another torch in the
# place of the pinned one.
# Safe to interrupt and to run again: what is there is kept, what is half there is redone. mmcv's operators are
# compiled from source, once per mmcv, torch, Python and GPU kind: the wheel is kept in the user's cache folder.
# A GPU that torch sees gets CUDA operators, which takes nvcc; CUDA_VISIBLE_DEVICES='' asks for CPU ones.
# Other variables: MAX_JOBS (compilers at a time), MIN_FREE_GB (disk asked for, 6), CXX, CUDA_HOME, XDG_CACHE_HOME,
# and to compile where there is no GPU, as on a login node: FORCE_CUDA=1 with TORCH_CUDA_ARCH_LIST.
set -euo pipefail

[ $# -ge 1 ] || { echo 'usage: tools/setup_venv.sh VENV [PYTHON]' >&2; exit 2; }
ROOT=$(cd "$(dirname "$0")/.." && pwd)
VENV=$1
PYTHON=${2:-python3}
CACHE=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/pvt_mm
LOG=$VENV/setup.log
MIN_FREE_GB=${MIN_FREE_GB:-6}
STACK=${STACK:-onedl}
REQUIREMENTS=$ROOT/requirements/$STACK.txt
CHILD='' WORK=''

say() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }
fail() { printf 'setup_venv: %s\n' "$*" >&2; exit 1; }
case $STACK in
    onedl) MMCV=onedl-mmcv HOSTS='onedl-mmdetection onedl-mmsegmentation' OTHER=mmengine ;;
    upstream) MMCV=mmcv HOSTS='mmdet mmsegmentation' OTHER=onedl_mmengine ;;
    *) fail "STACK=$STACK, expected onedl or upstream" ;;
esac
# transformers, of which a few tests make use, is for today's torch and breaks mmdet's import with one of before.
pins() {
    sed -e '/^-r /d' ${TORCH:+-e "s/^torch==.*/torch==$TORCH/" -e '/^transformers==/d'} \
        "$ROOT/requirements/common.txt" "$REQUIREMENTS"
}
pinned() { pins | sed -n "s/^$1==\([^ ;]*\).*/\1/p"; }

# Whatever ends the script ends the compilers too, and leaves no files in the temporary folder.
stop() {
    if [ -n "$CHILD" ]; then
        kill -TERM -- "-$CHILD" 2>/dev/null || true
        wait "$CHILD" 2>/dev/null || true
    fi
    if [ -n "$WORK" ]; then rm -rf "$WORK"; fi
}
trap stop EXIT
trap 'echo >&2; fail "interrupted; the same command continues from here"' INT TERM HUP

# Start a command with its output in the log, as a process group of its own (set -m) that `stop` can end whole.
start() {
    echo "+ $*" >>"$LOG"
    set -m
    "$@" </dev/null >>"$LOG" 2>&1 &
    CHILD=$!
    set +m
}
finish() { local status=0; wait "$CHILD" || status=$?; CHILD=; return "$status"; }
run() { start "$@"; finish; }

# The same, but a failure ends the script: first errors and end of the log, then one sentence.
must() {
    local what=$1; shift
    run "$@" || log_fail "$what"
}
log_fail() {
    { grep -E -m 5 '(^|[ :])(fatal )?error: |^ERROR: ' "$LOG" || true; echo ...; tail -n 15 "$LOG"; } >&2
    fail "$1 failed, see the lines above and $LOG; once cured, run the same command again: it continues."
}
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

# --- what would otherwise go wrong after minutes ---------------------------------------------------------------------

check_python() {
    local python=$1 hint=$2 version last=3.13
    if [ "$STACK" = upstream ]; then last=3.12; fi
    command -v "$python" >/dev/null || fail "found no '$python' on PATH; install Python 3.10 to $last, $hint"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        fail "'$python' does not run; $hint"
    case $version in
        3.1[0-2] | "$last") ;;  # below, torch has no build; above, numpy $(pinned numpy) has none
        *) fail "'$python' is Python $version, and the pinned packages exist for Python 3.10 to $last; $hint" ;;
    esac
}

check_venv_module() {
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "'$PYTHON' lacks the modules venv and ensurepip; install them (Debian, Ubuntu: apt install python3-venv," \
             "of the same Python version)"
}

check_compiler() {
    local python=$1 include
    echo '#include <optional>' | "${CXX:-c++}" -std=c++17 -fsyntax-only -x c++ - 2>/dev/null ||
        fail "'${CXX:-c++}' is no working C++17 compiler, and mmcv's operators are compiled from source; install one" \
             "(Debian, Ubuntu: apt install g++) or name one in CXX"
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -f "$include/Python.h" ] ||
        fail "found no $include/Python.h, which compiling mmcv's operators needs; install Python's headers" \
             "(Debian, Ubuntu: apt install python3-dev, of the same Python version)"
}

check_disk() {
    local free_gb
    free_gb=$(df -Pk "$(dirname "$VENV")" | awk 'NR == 2 {print int($4 / 1048576)}')
    [ "$free_gb" -ge "$MIN_FREE_GB" ] ||
        fail "$free_gb GB free for $VENV, and the environment with its CUDA libraries needs $MIN_FREE_GB GB; make room," \
             "name a folder elsewhere (make VENV=...) or set MIN_FREE_GB (3 is enough where torch comes without CUDA)"
}

check_nvcc() {
    local problem
    problem=$("$VENV/bin/python" - 2>>"$LOG" <<'EOF'
import re, subprocess, torch
from torch.utils.cpp_extension import CUDA_HOME
want = torch.version.cuda
if want is None:
    print(f'torch {torch.__version__} is built without CUDA')
elif CUDA_HOME is None:
    print(f'found no nvcc of CUDA {want}')
else:
    found = re.search(r'release (\S+),', subprocess.check_output([f'{CUDA_HOME}/bin/nvcc', '-V'], text=True))[1]
    if found.split('.')[0] != want.split('.')[0]:
        print(f'the nvcc in {CUDA_HOME} is of CUDA {found}, torch of CUDA {want}')
EOF
    ) || problem="the CUDA compiler's version cannot be read (see $LOG)"
    [ -z "$problem" ] ||
        fail "mmcv's operators cannot be compiled for the GPU: $problem; install the CUDA toolkit of torch's version and" \
             "set CUDA_HOME, or take operators for the CPU: CUDA_VISIBLE_DEVICES='' make demo"
}

# --- the parts -------------------------------------------------------------------------------------------------------

# A venv without working pip was interrupted while it was made; no work is lost with it. A folder with other files
# in it was meant for something else and is never removed.
make_venv() {
    if [ -d "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(find "$VENV" -type f ! -name setup.log | head -n 1)" ]; then
        fail "$VENV holds files but is no virtual environment (no pyvenv.cfg); name another folder or empty this one"
    fi
    rm -rf "$VENV"
    mkdir -p "$VENV"
    must "creating $VENV" "$PYTHON" -m venv "$VENV"
}

# pip writes INSTALLER and RECORD last: a package without them was interrupted, yet pip would call it installed.
forget_half_installed() {
    local info
    for info in "$VENV"/lib/python3*/site-packages/*.dist-info; do
        [ -d "$info" ] || continue
        if [ ! -f "$info/INSTALLER" ] || [ ! -s "$info/RECORD" ]; then
            echo "half installed: $info" >>"$LOG"
            rm -rf "$info"
        fi
    done
    rm -rf "$VENV"/lib/python3*/site-packages/~*  # what pip was about to replace
}

# Where a compiled mmcv belongs: anything in this name that differs makes the binary useless or, worse, nearly right.
wheel_folder() {
    "$VENV/bin/python" - "$(pinned "$MMCV")" 2>>"$LOG" <<'EOF'
import os, re, sys, sysconfig, torch
cuda = 'cpu'
if torch.cuda.is_available() or os.environ.get('FORCE_CUDA') == '1':
    gpus = {'%d.%d' % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    archs = os.environ.get('TORCH_CUDA_ARCH_LIST') or ' '.join(sorted(gpus)) or 'all'
    cuda = f'cu{torch.version.cuda}-sm' + re.sub(r'[^\w.+]+', '-', archs)
python = 'cp%d%d' % sys.version_info[:2]
print(f'mmcv{sys.argv[1]}-torch{torch.__version__}-{python}-{sysconfig.get_platform()}-{cuda}')
EOF
}

# The operators have to answer, since mmcv installs and imports without them.
check_ops() {
    run "$VENV/bin/python" -c "
import importlib.metadata, os, torch
assert importlib.metadata.version('$MMCV') == '$(pinned "$MMCV")'
from mmcv.ops import get_compiling_cuda_version, nms
boxes = torch.tensor([[0., 0., 10., 10.], [1., 1., 10., 10.], [20., 20., 30., 30.]])
gpu = torch.cuda.is_available()
if gpu or os.environ.get('FORCE_CUDA') == '1':
    assert get_compiling_cuda_version() != 'not available', 'mmcv.ops was compiled without CUDA'
for device in ['cpu', 'cuda'] if gpu else ['cpu']:
    kept = nms(boxes.to(device), torch.tensor([.9, .8, .7], device=device), iou_threshold=.5)[1].tolist()
    assert kept == [0, 2], f'nms on {device} kept boxes {kept}, expected [0, 2]'
"
}

# Ninja's counter, as one line on a terminal and as a line every ten files elsewhere.
show_progress() {
    local begin=$SECONDS count shown=0
    while kill -0 "$CHILD" 2>/dev/null; do
        sleep 1
        count=$(grep -oE '^ *\[[0-9]+/[0-9]+\]' "$LOG" | tail -n 1 | tr -d ' []') || continue
        if [ -t 1 ]; then
            printf '\r        mmcv ops %s, %d s ' "$count" $((SECONDS - begin))
        elif [ $((${count%/*} / 10)) -ne "$shown" ]; then
            shown=$((${count%/*} / 10))
            printf '        mmcv ops %s, %d s\n' "$count" $((SECONDS - begin))
        fi
    done
    if [ -t 1 ]; then echo; fi
}

# The same torch as at run time (no build isolation), no wheel from pip's cache (it may be of another torch).
build_mmcv() {
    local folder=$1 jobs wheel
    check_compiler "$VENV/bin/python"
    case $folder in *-cpu) ;; *) check_nvcc; export FORCE_CUDA=1 ;; esac
    # not nproc, which obeys OMP_NUM_THREADS
    jobs=${MAX_JOBS:-$("$VENV/bin/python" -c '
import os
print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')}
    say "4/6 $MMCV $(pinned "$MMCV"): compiling its operators, $jobs at a time (20 to 40 minutes of one core)"
    WORK=$(mktemp -d)
    start env TMPDIR="$WORK" MMCV_WITH_OPS=1 MAX_JOBS="$jobs" "$VENV/bin/python" -m pip wheel -v \
        --disable-pip-version-check --no-input --no-build-isolation --no-cache-dir --no-deps \
        -w "$WORK/out" "$MMCV==$(pinned "$MMCV")"
    show_progress
    finish || log_fail 'compiling mmcv'
    # A rename within one folder: another set-up never sees half a wheel.
    wheel=$(basename "$WORK"/out/*.whl)
    mkdir -p "$CACHE/$folder"
    mv "$WORK/out/$wheel" "$CACHE/$folder/.$wheel.$$"
    mv "$CACHE/$folder/.$wheel.$$" "$CACHE/$folder/$wheel"
    rm -rf "$WORK"
    WORK=
}
cached_wheel() { compgen -G "$CACHE/$1/*.whl" | head -n 1 || true; }
install_wheel() { run pip install -q --no-deps --force-reinstall "$1" && check_ops; }

install_mmcv() {
    local folder wheel
    if check_ops; then
        say "4/6 $MMCV $(pinned "$MMCV"): already there, operators work"
        return
    fi
    folder=$(wheel_folder) || log_fail 'importing torch'
    wheel=$(cached_wheel "$folder")
    if [ -n "$wheel" ]; then
        say "4/6 $MMCV $(pinned "$MMCV") from $CACHE"
        install_wheel "$wheel" && return
        say '    its operators do not work here: deleted, compiling it anew'
        rm -f "$wheel"
    fi
    build_mmcv "$folder"
    wheel=$(cached_wheel "$folder")
    if ! install_wheel "$wheel"; then
        rm -f "$wheel"
        log_fail 'the test of the compiled operators'
    fi
}

# --- main ------------------------------------------------------------------------------------------------------------

if compgen -G "$VENV/lib/python3*/site-packages/$OTHER-*.dist-info" >/dev/null; then
    fail "$VENV holds the other stack (${OTHER/_/-}), and each would overwrite the files of the other; name another" \
         "folder: make STACK=$STACK VENV=..."
fi
# The checks that a finished environment or a cached wheel makes needless are left out then.
if pip --version >/dev/null 2>&1; then
    fresh='' python=$VENV/bin/python
    check_python "$python" "remove $VENV or name another folder: make VENV=... demo"
else
    fresh=1 python=$PYTHON
    check_python "$python" 'name one with: make PYTHON=python3.11 demo'
    check_venv_module
fi
if ! compgen -G "$VENV/lib/python3*/site-packages/torch-$(pinned torch)*.dist-info" >/dev/null; then
    mkdir -p "$(dirname "$VENV")"
    check_disk
fi
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
if ! compgen -G "$VENV/lib/python3*/site-packages/${MMCV/-/_}-$(pinned "$MMCV").dist-info" >/dev/null &&
   ! compgen -G "$CACHE/mmcv$(pinned "$MMCV")-torch$(pinned torch)*-$tag-*/*.whl" >/dev/null; then
    check_compiler "$python"
fi

if [ -n "$fresh" ]; then make_venv; else : >"$LOG"; forget_half_installed; fi
say "setting up $VENV, details in $LOG"

# Each step takes its versions from the one file, and none may undo another's.
pins >"$VENV/requirements.txt"
say '1/6 build tools'
must 'installing the build tools' pip install -q -c "$VENV/requirements.txt" \
    pip setuptools wheel ninja psutil packaging
say "2/6 torch $(pinned torch)"
must 'installing torch' pip install -q -c "$VENV/requirements.txt" torch
say '3/6 mmengine, mmdetection, mmsegmentation and what they need'
grep -v "^$MMCV==" "$VENV/requirements.txt" >"$VENV/requirements-prebuilt.txt"
must 'installing the packages' pip install -q -r "$VENV/requirements-prebuilt.txt"
# The last of the two OpenCV packages wins their shared files; opencv-python's need libGL, which servers may lack.
run "$VENV/bin/python" -c 'import cv2' || must 'installing OpenCV without libGL' \
    pip install -q --no-deps --force-reinstall "opencv-python-headless==$(pinned opencv-python)"
must 'importing OpenCV, mmengine and torch' "$VENV/bin/python" -c 'import cv2, mmengine, torch'
install_mmcv
say '5/6 pvt_mm, editable'
must 'installing pvt_mm' pip install -q --no-build-isolation --no-deps -e "$ROOT"
say '6/6 checks'
must 'pip check' pip check
must 'importing mmdet, mmseg and pvt_mm' "$VENV/bin/python" -c 'import mmdet.models, mmseg.models, pvt_mm'
say "ready: $("$VENV/bin/python" -c '
import platform, sys, torch
from importlib.metadata import version
print(f"Python {platform.python_version()}, torch {torch.__version__},",
      ", ".join(f"{name} {version(name)}" for name in sys.argv[1:]))' "$MMCV" $HOSTS pvt-mmlab)"
