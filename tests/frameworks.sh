#!/usr/bin/env bash
# Installs the frameworks that the tests of integrations use where they find them, without another PyTorch, and runs
# those tests: timm, torchxrayvision and nnU-Net, which need torchvision, whose wheel names one release of PyTorch.
#
#     bash tests/frameworks.sh [arguments for pytest]
#
# in an environment that has the package with its [test] extra. Two minutes to install, about ten on two cores for the
# tests, without a GPU and without its memory.
#
# What it cannot show: torchvision's own operators, which its wheel may not have beside a CPU PyTorch (nms, so that no
# detection network is run); nnU-Net on several processes, which it starts on GPUs only, and a whole training of its
# 1000 epochs; timm's train.py itself, which is not in its wheel, only its parts put together as there; torchxrayvision's
# pretrained weights and the images of NIH and CheXpert, which nothing here downloads; anything on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
before=$(python -c "import torch; print(torch.__version__)")
pip install --quiet -c constraints.txt -e '.[nnunet]' torchvision timm torchxrayvision
after=$(python -c "import torch; print(torch.__version__)")
[ "$before" = "$after" ] || { echo "PyTorch $before has become $after" >&2; exit 1; }
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest -p no:benchmark -q -rs tests/test_framework_*.py \
  tests/test_training_integrations.py tests/test_recipes.py tests/test_heads.py "$@"
