"""Thresholds over whole runs: ``python -m benchmarks.whole_runs``.

What merging does to a layer shows at the end of a run, beside the same run without merging: the same network, batches
and schedules. Every run is a line of ``runs.jsonl``, written when it is done, so that a killed command goes on where it
was; ``report`` writes the table ``RESULTS.md`` and the short one of ``docs/thresholds.md`` from them.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import inmerge_fast
from benchmarks.helps import parser_with
from benchmarks.paper.protocol import environment
from inmerge_fast import InMerge, NoiseThreshold, QuantileThreshold, RankBudget
from inmerge_fast.rank_cost import RankCost, Snapshot

from .recipes import RECIPES, RESEED, Images, Recipe
from .table import BASELINE, RESEEDED, guide_section, updated, write_table

HERE = Path(__file__).parent
RUNS = HERE / "runs.jsonl"
GUIDE = HERE.parents[1] / "docs" / "thresholds.md"
# Arguments of InMerge; guard None where the collapse is to be seen.
SETTINGS: dict[str, dict[str, Any] | None] = {
    BASELINE: None,
    RESEEDED: None,
    "RankBudget()": {"threshold": RankBudget()},
    "NoiseThreshold(4), no guard": {"threshold": NoiseThreshold(4), "guard": None},
    "NoiseThreshold(4)": {"threshold": NoiseThreshold(4)},
    "QuantileThreshold(0.02), no guard": {"threshold": QuantileThreshold(0.02), "guard": None},
    "QuantileThreshold(0.02)": {"threshold": QuantileThreshold(0.02)},
    "0.3, no guard": {"threshold": 0.3, "guard": None},
}


def run(recipe: Recipe, setting: str, seed: int, data: str | None) -> dict[str, Any]:
    """One run: a line of the result file."""
    started = time.process_time()
    images = Images(recipe, data)
    net = recipe.net(images.classes, seed)
    optimizer = recipe.optimizer(net)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    arguments = SETTINGS[setting]
    plan = inmerge_fast.MergePlan(net, include_frozen=False)
    merger, seconds = None, 0.0
    if arguments is not None:
        merger = InMerge(net, start=recipe.start, stop=recipe.steps, seed=seed, **arguments)
    net.train()
    for x, y in images.batches(seed + RESEED if setting == RESEEDED else seed):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bf16):
            loss = functional.cross_entropy(net(x).float(), y)
        loss.backward()
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if merger is not None:
            before = time.process_time()
            merger.step()
            seconds += time.process_time() - before
    layers = zip(plan.layers, plan.weights(), strict=True)
    ranks = {layer.name: RankCost(Snapshot(weight, layer.layout), 0).rank for layer, weight in layers}
    found: dict[str, Any] = {
        "recipe": recipe.name, "setting": setting, "seed": seed, "steps": recipe.steps,
        "merging_steps": recipe.steps - recipe.start, "accuracy": _plain(images.accuracy(net)),
        "rank": {name: _plain(rank) for name, rank in ranks.items()},
        "filters": dict(zip(plan.names, plan.filters, strict=True)), "merger_seconds": seconds,
    }  # fmt: skip
    if merger is not None:
        rows = merger.summary().rows()
        found["layers"] = {row["name"]: {key: _plain(row[key]) for key in ("sampled", "merged", "rank_start", "lost",
                           "verdict", "stopped")} for row in rows}  # fmt: skip
    return found | {"cpu_seconds": time.process_time() - started} | environment(torch.device("cpu"))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def main(arguments: list[str] | None = None) -> None:
    """Run what has no line yet, then write the table."""
    parser = parser_with(
        __doc__, "pip install -c constraints.txt -e '.[paper]', and pneumoniamnist.npz for its recipes",
        "python -m benchmarks.whole_runs run --seeds 0", "python -m benchmarks.whole_runs report",
    )  # fmt: skip
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS)[:3])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(4)))
    parser.add_argument("--data", help="file with PneumoniaMNIST (default: pneumoniamnist.npz in INMERGE_DATA)")
    parser.add_argument("--out", type=Path, default=RUNS, help="result file, one line a run (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", inmerge_fast.NoEffectWarning)  # every line says what merged
    warnings.simplefilter("ignore", inmerge_fast.CollapseWarning)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {(line["recipe"], line["setting"], line["seed"]) for line in map(json.loads, lines)}
    for seed in options.seeds if options.command == "run" else []:
        for name in options.recipes:
            for setting in options.settings:
                if (name, setting, seed) in done:
                    continue
                found = run(RECIPES[name], setting, seed, options.data)
                with options.out.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                    file.flush()
                    os.fsync(file.fileno())  # a run takes minutes: what ends the machine after it cannot take it back
                right = "diverged" if found["accuracy"] is None else f"accuracy {100 * found['accuracy']:.2f} %"
                merged = sum(layer["merged"] for layer in found.get("layers", {}).values())
                print(f"{name:9} seed {seed} {setting:34} {found['cpu_seconds']:6.0f} s of CPU, {right}, "
                      f"{merged} merges", flush=True)  # fmt: skip
    if options.command == "report":
        print("written:", write_table(options.out))
        if options.out == RUNS:
            GUIDE.write_text(updated(GUIDE.read_text(encoding="utf-8"), guide_section(RUNS)), encoding="utf-8")


if __name__ == "__main__":
    main()
