"""Time of one ``merge_`` call on whole networks, beside the published loop: ``python -m benchmarks.bench_merge``.

Wall time from call to done, on the layers after the tenth convolution (the paper's choice), interleaved, median with
20 / 80 % quantiles. On a GPU also the device time of a call with nothing in cache and the host's time for it
(``benchmarks/on_gpu.py``). Writes ``benchmarks/results/<device>/merge.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import inmerge_fast
from benchmarks.on_gpu import GpuClock
from benchmarks.providers import eager, published
from tests import nets

NETS = {"VGG19": nets.vgg19, "ResNet-18": nets.resnet18, "ResNet-50": nets.resnet50, "DenseNet-121": nets.densenet121}
REGIMES = {"all pass": -1.0, "none passes": 1.0}
SETTINGS = {"alpha": 0.8, "prob": 0.3}


def cpu_name() -> str:
    """Model name of the processor."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, str]:
    """Everything a reader needs to judge a figure."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    triton = sys.modules.get("triton")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", "not loaded"),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "command": "python -m benchmarks.bench_merge " + " ".join(sys.argv[1:]),
    }


def seconds_of(call, device: torch.device) -> float:
    """Wall time of ``call()`` until its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def quantiles(samples: list[float]) -> dict[str, float]:
    """Median and 20 / 80 % quantiles in milliseconds."""
    fifths = statistics.quantiles(samples, n=5)
    return {"median_ms": statistics.median(samples) * 1e3, "q20_ms": fifths[0] * 1e3, "q80_ms": fifths[-1] * 1e3}


def time_net(name: str, device: torch.device, repeats: int, clock: GpuClock | None) -> list[dict[str, object]]:
    """Rows of the table for one network."""
    torch.manual_seed(0)
    model = NETS[name]().to(device)
    plan = inmerge_fast.MergePlan(model, skip_first=10)
    weights = plan.weights()
    rows = []
    for regime, threshold in REGIMES.items():
        calls = {
            "published": lambda _, t=threshold: published(weights, threshold=t, **SETTINGS),
            "merge_": lambda step, t=threshold: inmerge_fast.merge_(plan, threshold=t, seed=0, step=step, **SETTINGS),
        }
        if plan.path != "eager":
            calls["eager"] = lambda step, t=threshold: eager(plan, threshold=t, seed=0, step=step, **SETTINGS)
        samples: dict[str, list[float]] = {provider: [] for provider in calls}
        for repeat in range(-2, repeats):  # two rounds to warm up
            for provider, call in calls.items():
                if provider == "published" and repeat >= max(3, repeats // 10):
                    continue  # hundreds of times slower on a GPU
                seconds = seconds_of(lambda call=call, repeat=repeat: call(repeat + 2), device)
                if repeat >= 0:
                    samples[provider].append(seconds)
        for provider, taken in samples.items():
            row = {"net": name, "layers": len(plan.layers), "regime": regime, "provider": provider,
                   "path": plan.path, "samples": len(taken), **quantiles(taken)}  # fmt: skip
            if clock is not None and provider == "merge_":
                row |= clock.time(calls[provider], repeats)
                row |= clock.floor(plan, range(repeats), SETTINGS["prob"], writes=threshold == -1)
            rows.append(row)
    return rows


def main() -> None:
    """Time all networks and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    clock = GpuClock(device) if device.type == "cuda" else None
    rows = [row for name in NETS for row in time_net(name, device, options.repeats, clock)]
    about = environment(device)
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}, {about['threads']} thread(s)")
    print(f"{'net':13} {'regime':12} {'provider':10} {'median ms':>10} {'20 %':>9} {'80 %':>9}")
    for row in rows:
        print(f"{row['net']:13} {row['regime']:12} {row['provider']:10} {row['median_ms']:10.3f} "
              f"{row['q20_ms']:9.3f} {row['q80_ms']:9.3f}")  # fmt: skip
    if clock is not None:
        clock.print_table(rows)
        about |= clock.about()
    folder = options.out / "-".join(about["device"].replace("(R)", "").replace("(TM)", "").split())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "merge.json"
    path.write_text(json.dumps({"environment": about, "settings": SETTINGS, "results": rows}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
