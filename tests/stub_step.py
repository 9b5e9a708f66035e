"""In the place of Python in a GPU run: does what a step would, in no time, or hangs, crashes or is killed half-way.

``STUB_STEPS`` says which steps do so, as JSON: a word of their command line, and how.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ENVIRONMENT = {
    "device": "NVIDIA Stub", "cuda": "13.0", "driver": "580", "clocks": "fast", "commit": "c", "python": "3.12",
    "torch": "2.11", "triton": "3.6", "threads": 1, "copy_bandwidth_gb_s": 3000.0, "command": "python -m benchmarks",
}  # fmt: skip
MERGE = {"net": "VGG19", "dtype": "float32", "layers": 6, "regime": "all pass", "wall_us": 40.0, "floor_us": 15.0,
         "floor_bytes": 1e6}  # fmt: skip
MATCH = {"net": "VGG19", "dtype": "float32", "prob": 1.0, "wall_us": 90.0, "floor_flops_us": 9.0, "floor_bytes_us": 9.0}
HOST = {"target": "conv", "layers": 1, "driver": "cuda", "host_us": 9.0}
TRAINING = {"net": "VGG19", "batch": [8], "step_us": 9e3, "ab_us": 1.0, "ab_low_us": 0.0, "ab_high_us": 2.0}
SCALING = {"series": "filters", "dtype": "float32", "provider": "merge_", "regime": "all pass", "wall_us": 9.0,
           "floor_us": 5.0, "device_us": 8.0}  # fmt: skip
ROWS = {
    "merge": [MERGE | {"provider": provider} for provider in ("eager", "merge_")],
    "merge-published": [MERGE | {"provider": "published", "regime": r, "merge_us": 4.0} for r in ("all pass", "none")],
    "merge-compile": [MERGE | {"provider": "compile", "regime": r, "merge_us": 4.0} for r in ("all pass", "none")],
    "match": [MATCH | {"provider": provider} for provider in ("gemm", "match")],
    "host": [HOST | {"part": part} for part in ("merge_", "InMerge.step")],
    "forward": [MERGE | {"provider": provider, "merge_us": 4.0} for provider in ("eager", "merged")],
    "forward-compile": [MERGE | {"provider": "compile", "dtype": d, "merge_us": 4.0} for d in ("float32", "bfloat16")],
    "training-forward": [TRAINING | {"merging": "forward-only", "net": net} for net in ("VGG19", "ResNet-50")],
    "training": [TRAINING, TRAINING | {"net": "ResNet-50"}],
    "scaling": [SCALING | {"value": value, "floor_bytes": value * 1e6} for value in (1, 2)],
    "tuning": [{"net": "VGG19", "device_us": 9.0}, {"net": "ResNet-50", "device_us": 9.0}],
}


def behave(how):
    print("process", os.getpid())
    print("half-way", flush=True)
    if how == "hang":
        time.sleep(600)
    elif how == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    elif how == "crash":
        ctypes.string_at(0)
    elif how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "fail":
        raise SystemExit(1)
    elif how == "children":  # one in the session, one out of it, and both hold the output open
        for new_session in (False, True):
            child = subprocess.Popen(["sleep", "600"], start_new_session=new_session)
            print("child", child.pid, flush=True)


def main():
    arguments = sys.argv[1:]
    if arguments[0] == "-c":
        print("a GPU")
        return 0
    steps = json.loads(os.environ.get("STUB_STEPS", "{}"))
    how = next((how for word, how in steps.items() if any(word in argument for argument in arguments)), "pass")
    module = arguments[1]
    if module == "pytest":
        print("test_a PASSED", flush=True)
        behave(how)
        print("=== 3 passed in 0.1s ===")
        return 0
    from benchmarks.result_files import ResultFile

    name = module.removeprefix("benchmarks.bench_")
    for pass_ in ("published", "compile"):
        name += f"-{pass_}" if pass_ in arguments else ""
    name += "-forward" if "--forward-only" in arguments else ""
    file = ResultFile(Path(arguments[arguments.index("--out") + 1]), name, ENVIRONMENT, {})
    first, second = ROWS[name]
    file.add(first)
    with file.attempt(net="VGG19", provider="third"):
        if how == "one provider":
            raise RuntimeError("out of memory")
    behave(how)
    file.add(second)
    return file.finish()


if __name__ == "__main__":
    sys.exit(main())
