#!/usr/bin/env bash
# Create a virtual environment with one of the stacks in requirements/ and this project (editable), or complete one.
#
#   dev/setup_venv.sh VENV [PYTHON]      PYTHON (default python3) only creates VENV
#
# STACK=onedl (default) installs the maintained forks, STACK=upstream the originals. TORCH=2.1.2 installs that torch
# and not the pinned one.
# You can interrupt the script at any time and run it again: it keeps what is there and redoes what is half there.
# It compiles mmcv's operators once per mmcv, torch, Python and GPU kind, and keeps the wheel in the user's cache
# folder. dev/join_mmcv.py joins their sources first: they then compile in a minute, not in twenty.
# If torch sees a GPU, the operators are compiled for it too, which takes nvcc. CUDA_VISIBLE_DEVICES='' avoids that;
# FORCE_CUDA=1 with TORCH_CUDA_ARCH_LIST compiles for a GPU that is not there, as on a login node.
# Other variables: MAX_JOBS (compilers at a time), MIN_FREE_GB (free disk to insist on, 6), CXX, CFLAGS (in place of
# Python's own), CUDA_HOME, TMPDIR, XDG_CACHE_HOME.
set -euo pipefail

[ $# -ge 1 ] || { echo 'usage: dev/setup_venv.sh VENV [PYTHON]' >&2; exit 2; }
ROOT=$(cd "$(dirname "$0")/.." && pwd)
VENV=$1
PYTHON=${2:-python3}
CACHE=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/pvt_mm
LOG=$VENV/setup.log
MIN_FREE_GB=${MIN_FREE_GB:-6}
STACK=${STACK:-onedl}
REQUIREMENTS=$ROOT/requirements/$STACK.txt
STARTED='' WORK='' PART=''

say() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }
fail() { printf 'setup_venv: %s\n' "$*" >&2; exit 1; }
case $STACK in
    onedl) MMCV=onedl-mmcv HOSTS='onedl-mmdetection onedl-mmsegmentation onedl-mmpretrain' OTHER=mmengine ;;
    upstream) MMCV=mmcv HOSTS='mmdet mmsegmentation mmpretrain' OTHER=onedl_mmengine ;;
    *) fail "STACK=$STACK, expected onedl or upstream" ;;
esac
# Each torchvision is for one torch, which pip knows.
pins() {
    sed -e '/^-r /d' ${TORCH:+-e "s/^torch==.*/torch==$TORCH/" -e 's/^torchvision==.*/torchvision/'} \
        "$ROOT/requirements/common.txt" "$REQUIREMENTS"
}
pinned() { pins | sed -n "s/^$1==\([^ ;]*\).*/\1/p"; }

# However the script ends, it ends the compilers and removes its temporary files. A second Ctrl-C does not stop that.
stop() {
    local signal
    trap '' INT TERM HUP
    if [ -n "$STARTED" ] && [ -n "${!:-}" ]; then
        for signal in INT TERM KILL; do  # after INT pip removes what it has left in its cache
            kill "-$signal" -- "-$!" 2>/dev/null || break
            for _ in {1..20}; do
                kill -0 -- "-$!" 2>/dev/null || break 2  # none of the group is left
                sleep 0.1
            done
        done
    fi
    if [ -n "$PART" ]; then rm -f "$PART"; fi
    if [ -n "$WORK" ]; then rm -rf "$WORK"; fi
}
trap stop EXIT
trap 'trap "" INT TERM HUP; echo >&2; fail "interrupted; the same command continues from here"' INT TERM HUP

# Start a command with its output in the log. It gets its own process group (set -m), which `stop` ends as a whole.
# STARTED is set before the process exists: a signal may come between any two commands.
start() {
    echo "+ $*" >>"$LOG"
    set -m
    STARTED=1
    "$@" </dev/null >>"$LOG" 2>&1 &
    set +m
}
finish() { local status=0; wait "$!" || status=$?; STARTED=; return "$status"; }
run() { start "$@"; finish; }

# Run a command, and if it fails, end the script: print the first errors, the end of the log and one sentence.
must() {
    local what=$1; shift
    run "$@" || log_fail "$what"
}
log_fail() {
    { grep -E -m 5 '(^|[ :])(fatal )?error: |^ERROR: ' "$LOG" || true; echo ...; tail -n 15 "$LOG"; } >&2
    fail "$1 failed; see the lines above and $LOG, then run the same command again: it continues from here"
}
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

# --- checks, before anything is installed -----------------------------------------------------------------------------

check_python() {
    local python=$1 hint=$2 version last=3.13
    if [ "$STACK" = upstream ]; then last=3.12; fi
    command -v "$python" >/dev/null || fail "found no '$python' on PATH; install Python 3.10 to $last, $hint"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        fail "'$python' does not run; $hint"
    case $version in
        3.1[0-2] | "$last") ;;  # the pinned torch has no build for older ones, the pinned numpy none for newer ones
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
        fail "'${CXX:-c++}' is not a working C++17 compiler, and mmcv's operators have to be compiled; install one" \
             "(Debian, Ubuntu: apt install g++) or name one in CXX"
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -f "$include/Python.h" ] ||
        fail "found no $include/Python.h, and mmcv's operators do not compile without it; install Python's headers" \
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
        print(f'the nvcc in {CUDA_HOME} is for CUDA {found}, torch for CUDA {want}')
EOF
    ) || problem="the CUDA compiler's version cannot be read (see $LOG)"
    [ -z "$problem" ] ||
        fail "mmcv's operators cannot be compiled for the GPU: $problem; install the CUDA toolkit of torch's version and" \
             "set CUDA_HOME, or compile them for the CPU only: CUDA_VISIBLE_DEVICES='' make demo"
}

# --- the steps --------------------------------------------------------------------------------------------------------

# An environment without a working pip was interrupted while it was made, and nothing is lost with it. A folder with
# other files is meant for something else: the script never removes it.
make_venv() {
    if [ -d "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(find "$VENV" -type f ! -name setup.log | head -n 1)" ]; then
        fail "$VENV holds files but is no virtual environment (no pyvenv.cfg); name another folder or empty this one"
    fi
    rm -rf "$VENV"
    mkdir -p "$VENV"
    must "creating $VENV" "$PYTHON" -m venv "$VENV"
}

# pip writes INSTALLER and RECORD last. A package without them is half installed, and pip would not notice.
forget_half_installed() {
    local info
    for info in "$VENV"/lib/python3*/site-packages/*.dist-info; do
        [ -d "$info" ] || continue
        if [ ! -f "$info/INSTALLER" ] || [ ! -s "$info/RECORD" ]; then
            echo "half installed: $info" >>"$LOG"
            rm -rf "$info"
        fi
    done
    rm -rf "$VENV"/lib/python3*/site-packages/~*  # pip was replacing these
}

# The compiled part of PyPI's torchvision is for CUDA. Beside a torch without CUDA it does not load, and then the import
# fails for want of two declarations; mmdet, which imports it through mmpretrain, fails with it. Only torchvision's
# transforms are needed here, not its operators, so the two are declared.
declare_torchvision_ops() {
    local folder
    if run "$VENV/bin/python" -c 'import torchvision'; then return; fi
    folder=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cat >>"$folder/torchvision/extension.py" <<'EOF'

if not _has_ops():  # added by dev/setup_venv.sh of pvt_mm
    _declared = torch.library.Library('torchvision', 'DEF')
    for _name in ('nms', 'qnms'):
        _declared.define(f'{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
EOF
    must 'importing torchvision' "$VENV/bin/python" -c 'import torchvision'
}

# The folder of a compiled mmcv in the cache. A wheel for another of these would not work, or work wrongly.
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

# Call an operator: mmcv installs and imports without the compiled ones, too.
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

# Show ninja's counter, as it stands after a line of the log: in place on a terminal, elsewhere line by line.
show_progress() {
    local first=$1 begin=$SECONDS count tenth shown=0
    while kill -0 "$!" 2>/dev/null; do
        sleep 1
        count=$(tail -n "+$first" "$LOG" | grep -oE '^ *\[[0-9]+/[0-9]+\]' | tail -n 1 | tr -d ' []') || continue
        tenth=$((10 * ${count%/*} / ${count#*/}))
        if [ -t 1 ]; then
            printf '\r        mmcv ops %s, %d s ' "$count" $((SECONDS - begin))
        elif [ "$tenth" -ne "$shown" ]; then
            printf '        mmcv ops %s, %d s\n' "$count" $((SECONDS - begin))
        fi
        shown=$tenth
    done
    if [ -t 1 ]; then echo; fi
}

# Compile a folder or a source distribution of mmcv into a wheel in $WORK/out. Without build isolation, so that it is
# compiled for the torch of this environment. CFLAGS takes the place of Python's flags (-O3 among them), so these are
# passed on; -g0 leaves out the debug symbols, which are 30 MB.
compile_mmcv() {
    local source=$1 jobs=$2 flags first
    flags=${CFLAGS-$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("CFLAGS") or "")')}
    first=$(($(wc -l <"$LOG") + 1))
    start env CFLAGS="$flags -g0" MMCV_WITH_OPS=1 MAX_JOBS="$jobs" "$VENV/bin/python" -m pip wheel -v \
        --disable-pip-version-check --no-input --no-build-isolation --no-cache-dir --no-deps -w "$WORK/out" "$source"
    show_progress "$first"
    finish
}

build_mmcv() {
    local folder=$1 version jobs sdist wheel
    version=$(pinned "$MMCV")
    check_compiler "$VENV/bin/python"
    case $folder in *-cpu) ;; *) check_nvcc; export FORCE_CUDA=1 ;; esac
    # not nproc, which obeys OMP_NUM_THREADS
    jobs=${MAX_JOBS:-$("$VENV/bin/python" -c '
import os
print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')}
    case $folder in
        *-cpu) say "4/6 $MMCV $version: compiling its operators, $jobs at a time (about a minute)" ;;
        *) say "4/6 $MMCV $version: compiling its operators and CUDA kernels, $jobs at a time (tens of minutes)" ;;
    esac
    must 'downloading mmcv' pip download -q --no-deps --no-build-isolation --no-binary "$MMCV" -d "$WORK/sdist" \
        "$MMCV==$version"
    sdist=$(compgen -G "$WORK/sdist/*.tar.gz") || fail "found no source distribution of $MMCV $version, only a wheel"
    if ! { run "$VENV/bin/python" -m tarfile -e "$sdist" "$WORK/joined" &&
           run "$VENV/bin/python" "$ROOT/dev/join_mmcv.py" "$WORK"/joined/* &&
           compile_mmcv "$(compgen -G "$WORK/joined/*")" "$jobs"; }; then
        say '    the joined sources do not compile (see the log): compiling each as it is, 15 to 30 minutes of one core'
        compile_mmcv "$sdist" "$jobs" || log_fail 'compiling mmcv'
    fi
    # A rename within one folder, so that another set-up never sees half a wheel.
    wheel=$(basename "$WORK"/out/*.whl)
    mkdir -p "$CACHE/$folder"
    PART=$CACHE/$folder/.$wheel.$$
    mv "$WORK/out/$wheel" "$PART"
    mv "$PART" "$CACHE/$folder/$wheel"
    PART=
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
        say '    its operators do not work here: deleted the wheel, compiling it again'
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
# A finished environment or a cached wheel makes some checks needless.
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

# A folder for all temporary files, those of pip and the compilers too. `stop` knows its name before it exists.
WORK=$(mktemp -du "${TMPDIR:-/tmp}/pvt_mm-setup.XXXXXXXXXX")
mkdir -m 700 "$WORK"
export TMPDIR=$WORK

if [ -n "$fresh" ]; then make_venv; else : >"$LOG"; forget_half_installed; fi
say "setting up $VENV, details in $LOG"

# Each step takes its versions from one file, so that none replaces what another has installed.
pins >"$VENV/requirements.txt"
say '1/6 build tools'
must 'installing the build tools' pip install -q -c "$VENV/requirements.txt" \
    pip setuptools wheel ninja psutil packaging
say "2/6 torch $(pinned torch)"
must 'installing torch' pip install -q -c "$VENV/requirements.txt" torch
say '3/6 mmengine, mmdetection, mmsegmentation, mmpretrain and what they need'
grep -v "^$MMCV==" "$VENV/requirements.txt" >"$VENV/requirements-prebuilt.txt"
must 'installing the packages' pip install -q -r "$VENV/requirements-prebuilt.txt"
# An environment from before mmpretrain has it here and not in peers/ (see requirements/peers.txt).
must 'removing transformers' pip uninstall -q -y transformers
# Two OpenCV packages share their files, and the last one installed wins. opencv-python needs libGL, which servers may
# lack: then the headless one is installed again.
run "$VENV/bin/python" -c 'import cv2' || must 'installing OpenCV without libGL' \
    pip install -q --no-deps --force-reinstall "opencv-python-headless==$(pinned opencv-python)"
must 'importing OpenCV, mmengine and torch' "$VENV/bin/python" -c 'import cv2, mmengine, torch'
declare_torchvision_ops
install_mmcv
say '5/6 pvt_mm, editable'
must 'installing pvt_mm' pip install -q --no-build-isolation --no-deps -e "$ROOT"
say '6/6 checks'
must 'pip check' pip check
must 'importing the hosts and pvt_mm' "$VENV/bin/python" -c '
from pvt_mm.engine import import_host
for host in ("mmdet", "mmseg", "mmpretrain"):
    import_host(host)'
say "ready: $("$VENV/bin/python" -c '
import platform, sys, torch
from importlib.metadata import version
print(f"Python {platform.python_version()}, torch {torch.__version__},",
      ", ".join(f"{name} {version(name)}" for name in sys.argv[1:]))' "$MMCV" $HOSTS pvt-mmlab)"
