#!/bin/sh
# Builds pyfasa's CUDA part, checks every kernel against the reference, runs them under compute-sanitizer, compares whole
# models with the CPU, and times: everything that needs a GPU, in one call, from the root of the project.
#
#   tests/gpu/run.sh [results folder]
#
# Needs nvcc, cmake, and a Python with llama-cpp-python built for CUDA and with pyfasa's requirements. Settings:
#   PYTHON=python3   PYFASA_BUILD=build/gpu   PYFASA_STEPS="build kernels sanitize models stages speed experts bus host"
#   PYFASA_TERABYTES=3.0   per second: what floors of stages are reckoned with
#   PYFASA_BIG=     a model for the timings; without it a random 8B-shaped one is made
set -eu
RESULTS=${1:-build/gpu-results}
PYTHON=${PYTHON:-python3}
BUILD=${PYFASA_BUILD:-build/gpu}
STEPS=${PYFASA_STEPS:-build kernels sanitize models stages speed experts bus host}
SMALL=models/pyfasa-tiny-12m-Q8_0.gguf
mkdir -p "$RESULTS" "$BUILD"
failed=

step() { case " $STEPS " in *" $1 "*) echo "== $1"; return 0 ;; *) return 1 ;; esac; }
check() { "$@" || { echo "FAILED: $*"; failed="$failed $1"; }; }

if step build; then
    cmake -S . -B "$BUILD" -DPYFASA_TESTS=ON -DPYFASA_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="${PYFASA_ARCH:-native}" \
        -DPython_EXECUTABLE="$(command -v "$PYTHON")" > "$RESULTS/cmake.log"
    cmake --build "$BUILD" --parallel > "$RESULTS/build.log" 2>&1 || { tail -n 40 "$RESULTS/build.log"; exit 1; }
    cp "$BUILD"/_native*.so "$BUILD"/libpyfasa_cuda.so pyfasa/
fi
if step kernels; then
    check "$BUILD/fasa_cuda_tests"
fi
if step sanitize && command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        FASA_CUDA_SHAPES=small check compute-sanitizer --tool $tool --error-exitcode 9 "$BUILD/fasa_cuda_tests" \
            > "$RESULTS/$tool.log" 2>&1
        tail -n 2 "$RESULTS/$tool.log"
    done
fi
if step models; then
    check "$PYTHON" tests/gpu/check.py $SMALL
    check "$PYTHON" tests/gpu/head_start.py
fi
if step stages; then
    check "$BUILD/fasa_cuda_bench" "${PYFASA_TERABYTES:-3.0}" | tee "$RESULTS/cuda-stages.csv"
fi
BIG=${PYFASA_BIG:-}
if [ -z "$BIG" ] && { step speed || step host; }; then
    BIG="$RESULTS/../8b-random-Q4_0.gguf"
    [ -e "$BIG" ] || "$PYTHON" tests/gpu/random_gguf.py "$BIG"
fi
if step speed; then
    for kv in q8_0 f16; do
        check "$PYTHON" tests/gpu/bench.py "$BIG" --kv $kv --bits 4,2 --depths 4096,32768,131072 > "$RESULTS/cuda-$kv.csv"
        check "$PYTHON" tests/gpu/bench.py "$BIG" --kv $kv --depths 4096,8192,12288,16384,24576 --min-ctx 4000 \
            > "$RESULTS/cuda-early-$kv.csv"
    done
fi
if step experts; then
    EXPERTS="$RESULTS/../a3b-random-Q4_0.gguf"
    [ -e "$EXPERTS" ] || "$PYTHON" tests/gpu/random_gguf.py "$EXPERTS" a3b
    for kv in q8_0 f16; do
        check "$PYTHON" tests/gpu/bench.py "$EXPERTS" --kv $kv --bits 4 --depths 4096,16384,32768,131072 \
            > "$RESULTS/cuda-moe-$kv.csv"
    done
fi
if step bus; then
    check "$BUILD/fasa_cuda_bus" | tee "$RESULTS/cuda-bus.csv"
fi
if step host; then
    check "$PYTHON" tests/gpu/bench.py "$BIG" --kv f16 --depths 4096,16384,32768 --bits 4 --kv-on-host --threads 16 --n-gen 8 \
        --repetitions 3 > "$RESULTS/cuda-host-f16.csv"
fi
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
