#!/usr/bin/env bash
# One visit to a GPU machine without a network, with what stage.sh has collected in .gpu/.
#
#   benchmarks/gpu/run.sh check [SECONDS]      install, mmcv for the GPU, tests/gpu (300 s at most)
#   benchmarks/gpu/run.sh measure [SECONDS]    variants, speed beside the peers, training (540 s at most)
#
# Each section has a time limit and leaves a JSON file in $OUT (default gpu-results), the most important first, so that
# a visit which is cut off still tells. A section that fails does not stop the next; the exit code is then 1.
# DEVICE=cpu rehearses both at tiny sizes, in four times the time. PYTHON names the machine's Python, WORK a folder for
# what is installed.
set -uo pipefail
cd "$(dirname "$0")/../.."

PHASE=${1:-}
export DEVICE=${DEVICE:-cuda}
OUT=${OUT:-gpu-results}
PYTHON=${PYTHON:-python3}
WORK=${WORK:-/tmp/pvt_mm-gpu}
export WORK PYTHON PYTHONUNBUFFERED=1 PYTHONPATH=$WORK/site:$PWD TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
FAILED=0

case $PHASE in
    check) BUDGET=${2:-300} ;;
    measure) BUDGET=${2:-540} ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
MATRIX=--matrix COMPILED=--matrix MODELS='pvt_v2_b2 pvt_small' DETECTION=2x800x1344 PEERS='' TURNS='--pairs 3' SLOWER=1
SIZES='2x800x1344 2x800x1184 2x832x1056 2x736x1312' JOBS=6  # the first size also loads the libraries
if [ "$DEVICE" = cpu ]; then
    SIZES='1x32x64 1x64x96' JOBS=1
    SLOWER=4 BUDGET=$((4 * BUDGET)) MODELS=pvt_v2_b0 DETECTION=1x32x64 TURNS='--pairs 1 --min-seconds 0.01 --keep'
    MATRIX="pvt_tiny pvt_v2_b0 --mode train inference --images $DETECTION" COMPILED="pvt_v2_b0 --images $DETECTION"
fi
if compgen -G '.gpu/official/pvt*.py' >/dev/null; then PEERS='--peers mmdet timm hf official --official .gpu/official'; fi
mkdir -p "$OUT" "$WORK"
OUT=$(cd "$OUT" && pwd)
left() { echo $((BUDGET - SECONDS)); }
least() { echo $(($1 < $2 ? $1 : $2)); }

# section NAME LIMIT [--result FILE] -- COMMAND...: not longer than the phase.
section() {
    local name=$1 limit
    limit=$(least $(($2 * SLOWER)) "$(left)")
    shift 2
    if [ "$limit" -lt 5 ]; then echo "--- $name: no time left"; FAILED=1; return 1; fi
    "$PYTHON" -m benchmarks.gpu.section "$OUT/$name.json" "$limit" "$@" || { FAILED=1; return 1; }
}

# speed NAME LIMIT ARGUMENTS...: a measurement that stops by itself before its limit.
speed() {
    local name=$1 limit=$2 seconds
    seconds=$(least $((limit * SLOWER)) "$(left)")
    shift 2
    section "$name" "$limit" --result "$WORK/$name.json" -- "$PYTHON" -m benchmarks.speed "$@" $TURNS \
        --device "$DEVICE" --time-limit $((seconds - 12)) --json "$WORK/$name.json"
}

# A second run on the same machine finds what the first one has installed.
if [ ! -f "$WORK/ready" ]; then
    section install 360 -- bash benchmarks/gpu/install.sh .gpu "$WORK/site" "$OUT" && touch "$WORK/ready"
fi
section environment 60 --result "$WORK/environment.json" -- \
    "$PYTHON" -m benchmarks.gpu.environment --json "$WORK/environment.json"

if [ "$PHASE" = check ]; then
    section tests 300 --result "$WORK/tests.json" -- \
        "$PYTHON" -m benchmarks.gpu.tests --json "$WORK/tests.json" --work "$WORK" \
        --limit $((220 * SLOWER)) --jobs $JOBS
else
    speed variants $((BUDGET / SLOWER / 4)) $MODELS --mode train --images $DETECTION --dtype bfloat16 --peers \
        --variants all --optimizer plain foreach fused --with-cp
    speed sizes 75 ${MODELS%% *} --mode train --images $SIZES --dtype float32 float16 --peers mmdet timm \
        --variants attention_flash dwconv_nchw
    speed speed $((BUDGET / SLOWER / 4)) $MATRIX $PEERS
    speed profile 60 ${MODELS%% *} --mode train --images $DETECTION --dtype bfloat16 --peers --profile
    for name in bccd camvid; do
        seconds=$(least 240 $(($(left) - 15)))
        if [ -d ".gpu/data/$name" ] && { [ "$seconds" -ge 45 ] || [ "$DEVICE" = cpu ]; }; then
            section "$name" $((seconds + 15)) --result "$WORK/$name.json" -- \
                "$PYTHON" -m benchmarks.gpu.learn "benchmarks/gpu/$name.py" --data ".gpu/data/$name" \
                --seconds "$seconds" --work-dir "$WORK/$name" --json "$WORK/$name.json"
        fi
    done
    if [ "$(left)" -ge 60 ]; then speed compiled "$(left)" $COMPILED --compile $PEERS; fi
fi
echo "--- $PHASE: $SECONDS s; results in $OUT:"
ls -l "$OUT"
exit "$FAILED"
