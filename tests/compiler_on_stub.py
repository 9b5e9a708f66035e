"""Merges with every partner rule as on a GPU, over a driver that does nothing; prints what the plan says as JSON.

Triton's launcher is built on the way, or not: there may be no compiler.
"""

import json
import os
import sys

import torch
from stub import StubDriver

import inmerge_fast


def main():
    os.environ["INMERGE_INTERPRET"] = "1"  # the plan takes the kernels for CPU tensors; they are compiled ones here
    sys.modules["triton.runtime.driver"]._create_driver = StubDriver
    weights = [torch.randn(64, 40)]
    plan = inmerge_fast.MergePlan(weights)
    printed = str(plan)
    ran = {inmerge_fast.merge_(plan, seed=1, step=0, partner=rule).path for rule in ("random", "similar", "nearest")}
    print(json.dumps({"path": plan.path, "printed": printed, "ran": sorted(ran)}))


if __name__ == "__main__":
    main()
