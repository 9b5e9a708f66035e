#!/usr/bin/env bash
# The suite on the oldest or the newest releases that pyproject.toml declares; CI runs it on those of constraints.txt.
#
#     bash tests/stacks.sh oldest|newest FOLDER [arguments for pytest]
#
# Makes a virtual environment in FOLDER, or takes the one that is there: with CUDA builds of PyTorch 6 GB. The oldest
# are the lower bounds as they stand there, with the oldest Python; what they need in turn is as new as pip finds it.
# PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:?oldest or newest} folder=${2:?a folder for the environment}
shift 2

bounds=$(mktemp)
trap 'rm -f "$bounds"' EXIT
case $which in
oldest)
  grep -oE '"[A-Za-z0-9_.-]+>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=/==/' | sort -u > "$bounds"
  oldest=$(sed -nE 's/^requires-python = ">=([0-9.]+)"$/\1/p' pyproject.toml)
  python=${PYTHON:-python$oldest} ;;
newest) python=${PYTHON:-python3} ;;
*) echo "oldest or newest, not $which" >&2; exit 2 ;;
esac

[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
python=$folder/bin/python
"$python" -m pip install --quiet --upgrade --upgrade-strategy eager -c "$bounds" -e '.[test]'
"$python" -m pip list 2> /dev/null | awk 'NR > 2 {print $1 "==" $2}' |
  grep -iE '^(torch|triton|numpy|scipy|scikit-learn|matplotlib|transformers|accelerate|lightning|pytest|hypothesis)==' |
  tr '\n' ' '
"$python" --version
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$python" -m pytest -p no:benchmark -q -n 2 --dist loadfile "$@"
