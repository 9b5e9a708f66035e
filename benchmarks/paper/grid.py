"""Runs many runs: resumes, several processes with one thread each or the ranks of ``torchrun``, progress."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from inmerge_fast.demo.data import require

from . import protocol
from .config import Recipe, Run, digest
from .data import is_leader, load
from .dataset import AS_IT_IS, Reading
from .image_cache import default_folder
from .models import Weights
from .storage import append, is_stored, load_result, mend

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Where:
    """Where runs are done and kept.

    Attributes:
        out: folder of the result files.
        root: folder of the data, None for the default of :func:`benchmarks.paper.data.load`.
        device: torch device.
        processes: processes at a time, each with one thread on a CPU.
        tensorboard: folder of TensorBoard's logs, or None.
        weights: file with pre-trained weights, or None.
        reading: what the data's files leave open.
    """

    out: Path
    root: str | None = None
    device: str = "cpu"
    processes: int = 1
    tensorboard: str | None = None
    weights: Weights | None = None
    reading: Reading = AS_IT_IS


_benches: dict[Hashable, protocol.Bench] = {}


def bench_for(recipe: Recipe, where: Where) -> protocol.Bench:
    """The data of a recipe, loaded once per process."""
    key = (recipe.data, recipe.size, recipe.limit, where.root, where.device, where.weights, where.reading)
    if key not in _benches:
        data = load(recipe.data, size=recipe.size, root=where.root, reading=where.reading)
        if is_leader() and multiprocessing.parent_process() is None:  # once, not from every process of the pool
            print(f"data: {data.describe()}", flush=True)
        _benches[key] = protocol.Bench(
            data, torch.device(where.device), recipe.limit, where.weights, cache=default_folder()
        )
    return _benches[key]


def execute(runs: Sequence[Run], where: Where) -> None:
    """Do the runs that have no result yet. Each is written when it is done, so that a kill loses only those under way.

    Raises:
        ValueError: the data or corruptions of a recipe cannot be used, or what is done already was done with other
            data; before anything is trained.
    """
    with _ranks(where) as rank:
        for recipe in dict.fromkeys(run.recipe for run in runs) if rank == 0 else ():
            mend(where.out, recipe.name)
        pending = [run for run in dict.fromkeys(runs) if not _is_done(run, where.out)]
        if dist.is_initialized():
            shared = [pending]
            dist.broadcast_object_list(shared, src=0)  # no rank may see a file that another one did not
            pending = shared[0]
        if rank == 0:
            print(f"{len(set(runs)) - len(pending)} of {len(set(runs))} runs are done already", flush=True)
        for recipe in dict.fromkeys(run.recipe for run in pending):
            bench = bench_for(recipe, where)
            bench.check_corruptions(recipe.corruptions)
            if where.weights is not None and is_leader():
                print(f"weights: {bench.check_weights(recipe)}", flush=True)
        _check_same_data(set(runs) - set(pending), where)
        tasks: dict[tuple[Recipe, int], list[Run]] = {}
        for run in sorted(pending, key=lambda run: run.seed):  # whole seeds first: half a grid is then balanced
            tasks.setdefault((run.recipe, run.seed), []).append(run)
        if where.processes > 1 and len(tasks) > 1 and not dist.is_initialized():
            _in_pool(list(tasks.values()), pending, where)
            return
        with _bar(len(pending), disable=rank > 0) as bar:
            for task in tasks.values():
                for run in _do(task, where):
                    bar.update()
                    bar.set_postfix_str(f"{run.recipe.name} {run.arm.label()} seed {run.seed}"[:60], refresh=False)


def _check_same_data(done: Iterable[Run], where: Where) -> None:
    """Two folders or files of one name share their results' names: those of the other must not pass for this one's.

    Raises:
        ValueError: results are of other data.
    """
    for run in done:
        try:
            source = bench_for(run.recipe, where).data.source
        except ValueError:  # the data are not here, and all runs are done: nothing else is looked at
            continue
        found = load_result(where.out, run.key())["data"]["source"]
        if found != source:
            raise ValueError(
                f"{where.out}: {run.key()} was done with other data of this name ({found}), not with {source}: choose "
                "another folder with --out"
            )


def _is_done(run: Run, out: Path) -> bool:
    return is_stored(out, run.key()) and (scores_path(out, run).exists() or not run.keep_scores)


def scores_path(out: Path, run: Run) -> Path:
    """Where a run's scores of every image are, if it keeps them."""
    return out / f"{run.key()}.npz"


def _bar(total: int, disable: bool = False) -> Any:
    tty = os.isatty(2)
    return require("tqdm", "tqdm").tqdm(
        total=total, unit=" runs", disable=disable, mininterval=0.1 if tty else 30.0, smoothing=0.05
    )


def _in_pool(tasks: list[list[Run]], pending: list[Run], where: Where) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    with context.Pool(where.processes, _one_thread) as pool, _bar(len(pending)) as bar:
        result = pool.starmap_async(_do_all, [(task, where) for task in tasks], chunksize=1)
        while not result.ready():
            result.wait(POLL_SECONDS)
            bar.update(sum(is_stored(where.out, run.key()) for run in pending) - bar.n)
        result.get()  # raises what a process raised
        bar.update(len(pending) - bar.n)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _do_all(task: list[Run], where: Where) -> None:
    for _ in _do(task, where):
        pass


def _do(task: list[Run], where: Where) -> Iterator[Run]:
    """Runs with the same recipe and seed: from one backbone."""
    if where.device == "cpu":
        torch.set_num_threads(1)  # more are slower on nets this small and on shared cores, and change the rounding
    bench = bench_for(task[0].recipe, where)
    backbone = _backbone(task[0].recipe, task[0].seed, bench, where)
    for run in task:
        with _logger(run, where) as log:
            result, scores = protocol.run_arm(run, bench, backbone, log)
        if dist.is_initialized():
            _check_ranks(run, result)
        if not dist.is_initialized() or dist.get_rank() == 0:
            _write(run, where.out, result, scores)
        yield run


def _check_ranks(run: Run, result: dict[str, Any]) -> None:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, result["digests"])
    # Batch-norm statistics are each rank's own between synchronisations, so the weights alone are compared.
    if len({values["parameters"] for values in found}) > 1:
        raise RuntimeError(f"the ranks have drifted apart in {run.key()}: {found}")


def _write(run: Run, out: Path, result: dict[str, Any], scores: dict[str, Any]) -> None:
    if run.keep_scores:
        path = scores_path(out, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez_compressed(part, **scores)
        part.replace(path)
    append(out, run.key(), result)  # last: a run that has a line is complete


def _backbone(recipe: Recipe, seed: int, bench: protocol.Bench, where: Where) -> protocol.State:
    values = protocol.backbone_identity(recipe, bench, seed)
    path = where.out / "checkpoints" / f"{recipe.name}-{digest(values)}.pt"
    if path.exists():
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:  # torch.load raises whatever its readers do
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            print(f"{path}: is damaged ({reason}); the backbone is trained again", file=sys.stderr, flush=True)
    state = protocol.train_backbone(recipe, bench, seed)
    if not dist.is_initialized() or dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        torch.save(state, part)
        part.replace(path)
    if dist.is_initialized():
        dist.barrier()
        return torch.load(path, weights_only=True)  # rank 0's batch-norm statistics
    return state


@contextlib.contextmanager
def _logger(run: Run, where: Where) -> Iterator[Any]:
    if where.tensorboard is None or (dist.is_initialized() and dist.get_rank() > 0):
        yield None
        return
    SummaryWriter = require("torch.utils.tensorboard", "tensorboard").SummaryWriter
    writer = SummaryWriter(str(Path(where.tensorboard) / run.key()))
    try:
        yield writer.add_scalar
    finally:
        writer.close()


@contextlib.contextmanager
def _ranks(where: Where) -> Iterator[int]:
    """Join the ranks of ``torchrun``, if it started this process; gives this one's number."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    if where.device.startswith("cuda"):
        torch.cuda.set_device(where.device)
    dist.init_process_group("nccl" if where.device.startswith("cuda") else "gloo")
    try:
        yield dist.get_rank()
        dist.barrier()  # a rank that is torn down while another still talks to it may abort
    finally:
        dist.destroy_process_group()
