"""What ``benchmarks/run_gpu.sh`` runs on a GPU: parts of less than nine minutes, the most valuable first in each.

The limits are what bounds a part. What a step should take is reckoned for an H100 with 16 cores, from this: Python,
PyTorch, Triton and a CUDA context start in 7 s, a simple kernel compiles in 1 s and one of all types in 4.
"""

from __future__ import annotations

from dataclasses import dataclass

NO_GPU = "no CUDA device: a rehearsal, everything quick"
PYTHON, RESULTS = "{python}", "{results}"  # in a step's command
MERCY = 2  # seconds that a process has to end when it is asked to, or is killed, and then its output
PYTEST = ("-m", "gpu", "-v", "--tb=short", "--durations=5", "-p", "no:cacheprovider", "-p", "benchmarks.tell_at_once",
          "-o", "faulthandler_timeout=30",
          # A warning of that machine's PyTorch or NumPy is in the log, and costs no minute of a GPU; one of ours fails.
          "-W", "default", "-W", "error::inmerge_fast.NoEffectWarning", "-W", "error::inmerge_fast.CollapseWarning",
          )  # fmt: skip
METRICS = ("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum",
           "dram__throughput.avg.pct_of_peak_sustained_elapsed")  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: what the log calls it, and the command line.
        limit: seconds after which it is ended.
        expected: seconds that it should take.
        why: what takes that time.
        command: what runs.
        quick: what is added to it in a rehearsal.
    """

    name: str
    limit: int
    expected: int
    why: str
    command: tuple[str, ...]
    quick: tuple[str, ...] = ()


def gpu_tests(name: str, limit: int, expected: int, why: str, file: str = "", keyword: str = "") -> Step:
    """The GPU tests of a file, by default the one of the step's name, or those of them that a keyword chooses."""
    chosen = (f"tests/{file or name}.py", *(("-k", keyword) if keyword else ()))
    return Step(name, limit, expected, why, (PYTHON, "-m", "pytest", *PYTEST, *chosen))


def bench(name: str, limit: int, expected: int, why: str, module: str, *arguments: str) -> Step:
    """One benchmark, or one pass of it."""
    command = (PYTHON, "-m", f"benchmarks.{module}", *arguments, "--out", RESULTS)
    return Step(name, limit, expected, why, command, ("--quick",))


VERSIONS = f"""
import importlib.util, platform, subprocess, sys, time
print(time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
try:
    print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=15).stdout)
except Exception as error:
    print("no nvidia-smi:", error)
print("python", sys.version.split()[0], platform.platform())
for name in ("numpy", "triton", "pytest", "hypothesis", "scipy", "sklearn", "torch"):
    found = importlib.util.find_spec(name)
    print(name, getattr(__import__(name), "__version__", "present") if found else "missing")
import torch
print("cuda", torch.version.cuda)
print(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else {NO_GPU!r})
"""
FIRST = Step("versions", 25, 10, "PyTorch from a cold disk", (PYTHON, "-c", VERSIONS))  # ahead of all others

# Steps in one tuple run at the same time: they look at no clock, and a machine with a GPU has cores to compile on.
# test_interpreted.py is left out: it needs no GPU, and runs wherever there is none.
CORRECT = [
    (gpu_tests("test_gpu_runtime", 60, 25, "streams, graphs, waiting: 17 tests, a few kernels"),),
    (gpu_tests("litmus", 90, 40, "111,000 launches at 0.2 ms with what checks them, 8 kernels of all types", "test_gpu",
           "litmus"),),
    (
        gpu_tests("real-nets", 120, 60, "16 nets and dtypes against float64, 8 kernels", "test_gpu",
              "real_nets and contiguous"),
        gpu_tests("real-nets-strided", 120, 60, "the same, channels_last", "test_gpu", "real_nets and channels_last"),
        gpu_tests("long-run", 120, 45, "10,000 steps at 3 ms with their replay; a weight of 4 GB; 24 draws", "test_gpu",
              "not litmus and not real_nets"),
        gpu_tests("test_gpu_match", 120, 50, "partner rules on real nets against float64, 12 kernels"),
        gpu_tests("random-models", 120, 60, "50 random models, each with a kernel of its own at worst", "test_merge",
              "random_configurations and models"),
        gpu_tests("test_merge", 120, 60, "450 random layers, 36 kernels", keyword="not models"),
        gpu_tests("test_training_kernels", 120, 30, "captured training steps"),
        gpu_tests("test_nets", 120, 30, "16 small nets"),
    ),
    (
        gpu_tests("test_compile", 90, 65, "torch.compile around merge_: Inductor alone takes 50 s"),
        *(
            gpu_tests(f"test_{name}", 70, 20, "a few kernels")
            for name in ("default_device", "draw", "effect", "forward_only", "hazards", "history", "inputs", "match",
                         "merge_plan", "plan", "plan_cache", "rank_in_background", "docs_snippets", "similarity",
                         "stats", "training_summary", "weights_that_move")
        ),
    ),
    (gpu_tests("test_gpu_memory", 100, 30, "compute-sanitizer, three runs, PyTorch started in each"),),
]  # fmt: skip

PUBLISHED_NETS = ("VGG19", "ResNet-50", "DenseNet-121")  # of the others a call takes as long, and decides nothing
SPEED = [
    (bench("merge", 170, 120, "14 nets and dtypes: 3 s of reference on the host, 2 s of samples in both regimes",
           "bench_merge", "--passes", "eager", "--dtypes", "float32", "bfloat16", "--seconds", "0.5"),),
    (bench("host", 35, 20, "8 targets, 4 ways to call, 100 samples of 20 calls", "bench_host", "--samples", "100"),),
    (bench("training", 90, 60, "3 nets, 400 steps at 30 ms, cuDNN's start", "bench_training"),),
    (bench("published", 70, 45, "3 nets: 17 calls at 0.1 to 1 s, their reference on the host",
           "bench_merge", "--passes", "published", "--nets", *PUBLISHED_NETS, "--seconds", "0.5"),),
    (bench("compile", 105, 75, "VGG19: four forms at 15 s of compiling",
           "bench_merge", "--passes", "compile", "--nets", "VGG19", "--dtypes", "float32", "--seconds", "0.5"),),
]  # fmt: skip

MORE = [
    (bench("match", 130, 75, "3 nets against float64; VGG19 compiled, 30 s",
           "bench_match", "--seconds", "0.5", "--compile-nets", "VGG19"),),
    (bench("scaling", 110, 70, "43 points in two regimes at 0.5 s, 15 kernels", "bench_scaling", "--seconds", "0.2"),),
    (bench("tuning", 170, 140, "13 works, 32 choices each at 0.1 s, 32 kernels at 3 s", "bench_tuning"),),
    (Step("nsight", 70, 40, "8 kernels one by one, PyTorch started under the profiler",
          ("ncu", "--clock-control", "none", "--launch-count", "8", "--metrics", ",".join(METRICS), "--kernel-name",
           "regex:_(draw|list|match|count|merge)_kernel", PYTHON, "-m", "benchmarks.once", "--calls", "4")),),
]  # fmt: skip

FORWARD = [
    (bench("forward", 170, 110, "14 nets and dtypes: 2 s of reference on the host, 2 s of samples, 3 kernels each",
           "bench_forward", "--passes", "eager", "--seconds", "0.5"),),
    (bench("training-forward", 90, 60, "3 nets, 400 steps at 30 ms, cuDNN's start", "bench_training",
           "--forward-only"),),
    (bench("forward-compile", 105, 60, "VGG19: a form at 15 s of compiling, and its restore",
           "bench_forward", "--passes", "compile", "--nets", "VGG19", "--seconds", "0.5"),),
]  # fmt: skip

PARTS: dict[str, list[tuple[Step, ...]]] = {"correct": CORRECT, "speed": SPEED, "more": MORE, "forward-only": FORWARD}


def every_step() -> dict[str, Step]:
    """All steps by name."""
    return {step.name: step for groups in PARTS.values() for group in groups for step in group}


def worst_case(part: str) -> int:
    """Seconds that a part takes if every step reaches its limit and does not end when it is asked to."""
    return sum(max(step.limit for step in group) + 3 * MERCY for group in [(FIRST,), *PARTS[part]])


def listing() -> str:
    """Parts and steps with their limits and what they should take, for a reader."""
    lines = []
    for part, groups in PARTS.items():
        expected = sum(max(step.expected for step in group) for group in [(FIRST,), *groups])
        lines.append(f"{part}: {expected} s expected, {worst_case(part)} s at most")
        for group in groups:
            together = " (at the same time)" if len(group) > 1 else ""
            for step in group:
                lines.append(f"  {step.name:21} {step.expected:3d} s, at most {step.limit:3d}: {step.why}{together}")
    return "\n".join(lines)
