#!/usr/bin/env bash
# All GPU tests, then all benchmarks, on a bare machine with a CUDA device, PyTorch, Triton and pytest; 9 minutes at most.
# usage: bash benchmarks/run_gpu.sh [folder for the results]   (default: $OUT, or ./gpu-results)
# Leaves tests.txt, benchmarks.txt and results/<device>/*.json there: 8 files, 2 folders deep.
# Exits with 1 if a test or a benchmark failed or reached its limit; the others run all the same. Copy the folder
# results/<device> to benchmarks/results/ and run `python -m benchmarks.report` to publish them.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-${OUT:-gpu-results}}" && cd "${1:-${OUT:-gpu-results}}" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
unset TRITON_INTERPRET INMERGE_INTERPRET INMERGE_FORCE_EAGER
failed=0

{
    date -u
    nvidia-smi || echo "no nvidia-smi"
    "$python" - <<'END'
import importlib.util, platform, sys
import numpy, torch
print("python", sys.version.split()[0], platform.platform())
print("torch", torch.__version__, "cuda", torch.version.cuda, "numpy", numpy.__version__)
for name in ("triton", "pytest", "hypothesis", "scipy", "sklearn", "xdist"):
    found = importlib.util.find_spec(name)
    print(name, getattr(__import__(name), "__version__", "present") if found else "missing")
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
END
} 2>&1 | tee "$out/tests.txt"

quick=() # without a GPU, a rehearsal
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || quick=(--quick)

tests() { # seconds, then arguments of pytest
    timeout --kill-after=5 "$1" "$python" -m pytest -m gpu -p no:cacheprovider --durations=10 "${@:2}" 2>&1 |
        tee -a "$out/tests.txt" | tail -n 40
    [ "${PIPESTATUS[0]}" = 0 ] || failed=1
}
bench() { # seconds, name, then arguments
    echo "== $2" | tee -a "$out/benchmarks.txt"
    timeout --kill-after=5 "$1" "$python" -m "benchmarks.$2" "${@:3}" "${quick[@]}" --out "$out/results" 2>&1 |
        tee -a "$out/benchmarks.txt"
    [ "${PIPESTATUS[0]}" = 0 ] || { echo "$2 failed or reached its limit" | tee -a "$out/benchmarks.txt"; failed=1; }
}

: >"$out/benchmarks.txt"
# The device's own tests first, alone, since some of them look at the time; then every other test that has a GPU
# variant, in parallel where pytest-xdist is there.
echo "== tests of the device"
tests 130 -v tests/test_gpu*.py
echo "== all other tests on the device"
parallel=$("$python" -c 'import xdist; print("-n 8")' 2>/dev/null)
ignored=$(printf -- '--ignore=%s ' tests/test_gpu*.py)
# shellcheck disable=SC2086
tests 80 -q $parallel $ignored tests

bench 15 bench_host --samples 100
bench 90 bench_merge --passes eager --repeats 40 --seconds 0.5
bench 40 bench_training
bench 30 bench_match --repeats 40 --seconds 0.5 --compile-nets VGG19
bench 20 bench_scaling --repeats 20 --seconds 0.2
bench 35 bench_tuning
bench 60 bench_merge --passes published compile --nets VGG19 --repeats 20 --seconds 0.5 # the slow and fragile, last

echo "== Nsight Compute" | tee -a "$out/benchmarks.txt"
if command -v ncu >/dev/null; then
    metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
    metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
    timeout --kill-after=5 15 ncu --metrics "$metrics" --kernel-name 'regex:_(draw|list|match|count|merge)_kernel' \
        "$python" -m benchmarks.once --calls 3 2>&1 | tee -a "$out/benchmarks.txt" ||
        echo "ncu failed" | tee -a "$out/benchmarks.txt"
else
    echo "no ncu" | tee -a "$out/benchmarks.txt"
fi

[ "$failed" = 0 ] && echo "all passed" || echo "FAILED: see the logs in $out"
exit "$failed"
