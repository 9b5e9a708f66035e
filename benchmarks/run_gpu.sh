#!/usr/bin/env bash
# Tests and benchmarks on a machine with a GPU, for whoever has one for a few minutes; PyTorch, Triton and pytest suffice.
# usage: bash benchmarks/run_gpu.sh [FOLDER] [--list] [--quick] [PART or STEP]...
# `--list` prints parts and steps, each with its limit, how long it should take, and why. All else: benchmarks/run_gpu.py.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m benchmarks.run_gpu "$@"
