#!/usr/bin/env bash
# Builds the CPU kernel with a sanitizer and runs tests/fuzz_cpu.c: sanitize_cpu.sh [ROUNDS] [SEED] [SANITIZERS]
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-1000} seed=${2:-0} sanitizers=${3-address,undefined}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
sources=$(grep -L python.h kernels/cpu/*.c)
# Work is spread over threads however little there is.
# shellcheck disable=SC2086
${CC:-cc} -std=c99 -O1 -g -ffp-contract=off -fopenmp -Wall -Wextra -Werror -DTHREAD_BYTES=1 -DPART_BYTES=4096 \
  ${sanitizers:+-fsanitize=$sanitizers -fno-sanitize-recover=all} tests/fuzz_cpu.c $sources -o "$folder/fuzz" -lm
OMP_WAIT_POLICY=passive "$folder/fuzz" "$rounds" "$seed"
