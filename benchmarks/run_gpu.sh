#!/usr/bin/env bash
# All GPU tests and the timing table, on a bare machine with a CUDA device, PyTorch, Triton and pytest; about 8 minutes.
# usage: bash benchmarks/run_gpu.sh [folder for the results]   (default: $OUT, or ./gpu-results)
# Exits with 1 if a test failed or a limit was reached; the benchmarks run all the same.
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
} 2>&1 | tee "$out/environment.txt"

# The device's own tests first, alone, since some of them look at the time; then every other test that has a GPU
# variant, in parallel where pytest-xdist is there.
echo "== tests of the device"
timeout --kill-after=5 240 "$python" -m pytest -m gpu -v --durations=15 -p no:cacheprovider \
    tests/test_gpu.py tests/test_gpu_runtime.py 2>&1 | tee "$out/tests-device.txt" | tail -n 60 || failed=1

echo "== all other tests on the device"
parallel=$("$python" -c 'import xdist; print("-n 8")' 2>/dev/null)
# shellcheck disable=SC2086
timeout --kill-after=5 150 "$python" -m pytest -m gpu -q --durations=10 -p no:cacheprovider $parallel \
    --ignore=tests/test_gpu.py --ignore=tests/test_gpu_runtime.py tests 2>&1 |
    tee "$out/tests-other.txt" | tail -n 60 || failed=1

echo "== benchmark"
device=$("$python" -c 'import torch; print("cuda --repeats 30" if torch.cuda.is_available() else "cpu --repeats 5")')
# shellcheck disable=SC2086
timeout --kill-after=5 75 "$python" -m benchmarks.bench_merge --device $device --out "$out/results" 2>&1 |
    tee "$out/benchmark.txt" || failed=1

[ "$failed" = 0 ] && echo "all passed" || echo "FAILED: see the logs in $out"
exit "$failed"
