"""The CPU kernel in its process: threads of its own and of Python, signals, forks, and memory that runs out."""

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import cpu_kernel
import numpy as np
import pytest
import torch
from cpu_kernel import bytes_of, run, similar_filters
from oracle import assert_same_bits, bits
from torch import nn

from inmerge_fast import MergePlan, merge_, native
from inmerge_fast.paths import cpu
from inmerge_fast.plan.candidates import MergeLayer

TASKS = Path("/proc/self/task")
LARGE = (512, 16384)  # 32 MB, of which half is looked at: work for several threads, and for about 10 ms

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def _kernel(monkeypatch):
    cpu_kernel.use(monkeypatch)


@pytest.fixture
def threads():
    kept = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(kept)


def in_a_process(code, **environment):
    """The output of ``code`` in a Python of its own, which has the build, ``run`` and the weights."""
    start = (
        f"import sys; sys.path[:0] = {[str(cpu_kernel.ROOT), str(cpu_kernel.ROOT / 'tests')]}\n"
        "import os, pytest, signal, threading, time, torch, cpu_kernel\n"
        "from cpu_kernel import *; from inmerge_fast.paths import cpu\n"
        f"sys.modules['inmerge_fast._cpu'] = kernel = cpu_kernel.load({str(cpu_kernel.build())!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", start + code],
        capture_output=True, text=True, timeout=120, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


# Threads.


@pytest.mark.parametrize("number", [2, 3, 8])
def test_the_number_of_threads_changes_no_bit(threads, number):
    before = [similar_filters(*LARGE), similar_filters(700, 3000, dtype=torch.bfloat16), similar_filters(40, 7)]
    found = {}
    for count in (1, number):
        threads(count)
        weights = [weight.clone() for weight in before]
        results = [bytes_of(run(weights, prob=prob, thresholds=limit)) for prob, limit in ((0.3, -1.0), (1.0, 0.5))]
        found[count] = (results, [bits(weight).numpy().tobytes() for weight in weights])
    assert found[1] == found[number]


@pytest.mark.skipif(not TASKS.exists(), reason="threads cannot be counted here")
def test_large_work_is_spread_over_the_callers_number_of_threads_and_small_work_is_not():
    code = """
torch.set_num_threads(1)
small, large = similar_filters(64, 100), similar_filters(512, 16384)
count = lambda: len(os.listdir("/proc/self/task"))
run(large); one = count()
torch.set_num_threads(3)
run(small); still = count()
run(large); three = count()
print(still - one, three - one)
"""
    assert in_a_process(code).split() == ["0", "2"]


def test_several_python_threads_at_once(threads):
    threads(2)
    before = [similar_filters(300, 3000, seed=seed) for seed in range(6)]
    expected = [weight.clone() for weight in before]
    pairs = [bytes_of(run(weight, seed=seed)) for seed, weight in enumerate(expected)]
    for _ in range(3):
        weights, found = [weight.clone() for weight in before], [None] * 6

        def merge(seed, weights=weights, found=found):
            found[seed] = bytes_of(run(weights[seed], seed=seed))

        workers = [threading.Thread(target=merge, args=(seed,)) for seed in range(6)]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]
        assert found == pairs
        for weight, one in zip(weights, expected, strict=True):
            assert_same_bits(weight, one)


def test_a_merger_can_be_called_by_several_threads_at_once():
    weight = similar_filters(400, 1000)
    plan = MergePlan(weight)
    merger = cpu.CpuMerge(plan.layers, plan.weights(), plan.rows.start)
    expected, found = bytes_of(run(weight, dry_run=True)), []

    def measure():
        for _ in range(20):
            pairs = merger.run(5, 3, prob=0.5, alpha=0.8, thresholds=0.5, dry_run=True)
            found.append(bytes_of(pairs) == expected)

    workers = [threading.Thread(target=measure) for _ in range(4)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert found == [True] * 80


def test_other_threads_run_meanwhile():
    weight = similar_filters(2000, 20000, special=False)  # 150 MB
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    worker = threading.Thread(target=tick)
    worker.start()
    start = time.perf_counter()
    run(weight, prob=1.0)
    end = time.perf_counter()
    stop.set()
    worker.join()
    inside = sum(start < t < end for t in ticks)
    assert inside >= 3, f"{inside} ticks in {end - start:.3f} s"


def test_memory_that_another_thread_frees_meanwhile_is_kept_until_the_end(monkeypatch):
    """As by model.half() during a call: it is lost then, but nothing else is written to."""
    kernel, looked = native.load(), []
    memory = np.zeros((8, 100), np.float32)
    weight, alive = nn.Parameter(torch.from_numpy(memory)), weakref.ref(memory)
    del memory
    merge_(weight, seed=0, step=0)

    def merge(*arguments):
        thread = threading.Thread(target=lambda: setattr(weight, "data", torch.ones(8, 100)))
        thread.start()
        thread.join()
        looked.append(alive() is not None)
        return kernel.merge(*arguments)

    plan = MergePlan(weight)
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(merge=merge))
    merge_(plan, prob=1.0, threshold=-1.0, seed=0, step=0)
    assert looked == [True]
    assert alive() is None
    assert torch.equal(weight.detach(), torch.ones(8, 100))


@pytest.mark.parametrize("calls_before", [0, 1])
def test_a_weight_that_another_thread_moves_before_the_call_is_an_error(calls_before, monkeypatch):
    weight = nn.Parameter(torch.randn(8, 100))
    plan, path = MergePlan(weight), cpu.CpuPath.merge
    for step in range(calls_before):
        merge_(plan, seed=0, step=step)
    merged = weight.detach().half()

    def move_first(self, weights, call):
        monkeypatch.undo()
        weight.data = merged.clone()
        return path(self, weights, call)

    monkeypatch.setattr(cpu.CpuPath, "merge", move_first)
    with pytest.raises(ValueError, match="by another thread"):
        merge_(plan, prob=1.0, threshold=-1.0, seed=0, step=0)
    assert torch.equal(weight, merged)


def test_the_same_memory_as_part_of_another_storage_is_merged():
    """A plan takes it for unchanged."""
    memory = np.ones((9, 100), np.float32)
    weight = nn.Parameter(torch.from_numpy(memory[1:]))
    plan = MergePlan(weight)
    for storage in (memory[1:], memory):
        weight.data = torch.from_numpy(storage)[-8:]
        assert plan.is_current()
        assert merge_(plan, prob=1.0, threshold=-1.0, seed=0, step=0).path == "cpu"


def test_a_weight_that_another_thread_moves_while_the_layer_table_is_made_is_an_error(monkeypatch):
    """Its new memory would be written to and is not held."""
    weight = nn.Parameter(torch.randn(8, 100))
    plan, made = MergePlan(weight), cpu.CpuMerge
    merged = weight.detach() + 1

    def move_first(*arguments):
        weight.data = merged.clone()
        return made(*arguments)

    monkeypatch.setattr(cpu, "CpuMerge", move_first)
    monkeypatch.setattr(MergeLayer, "is_current", lambda layer: True)  # it was looked at too early
    with pytest.raises(ValueError, match="by another thread"):
        merge_(plan, prob=1.0, threshold=-1.0, seed=0, step=0)
    assert torch.equal(weight, merged)


# Signals and forks.


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_a_signal_waits_until_all_is_merged():
    before = similar_filters(2000, 20000, special=False)
    expected, weight = before.clone(), before.clone()
    start = time.perf_counter()
    run(expected, prob=1.0, thresholds=-1.0)
    took = time.perf_counter() - start

    def interrupt(*_):
        raise KeyboardInterrupt

    kept = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, took / 5)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(weight, prob=1.0, thresholds=-1.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)
    assert_same_bits(weight, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_merges_too():
    code = """
torch.set_num_threads(3)
before = similar_filters(512, 16384)
expected, weight = before.clone(), before.clone()
run(expected)
child = os.fork()
if child == 0:
    signal.alarm(60)  # it would wait for ever for threads that only its parent has, as most of PyTorch does
    run(weight)
    os._exit(0 if weight.numpy().tobytes() == expected.numpy().tobytes() else 1)
print(os.waitpid(child, 0)[1])
"""
    assert in_a_process(code).split() == ["0"]


# Memory.


def test_without_memory_nothing_is_written():
    """Every allocation fails once, those of the kernel and those of Python."""
    code = """
import ctypes, itertools
before = [similar_filters(60, 100, seed=1), similar_filters(80, 50, seed=2)]
expected = [weight.clone() for weight in before]
run(expected, thresholds=-1.0)
plan_of = lambda weights: [layer_of(weight, layer_id=index) for index, weight in enumerate(weights)]
hook = ctypes.CDLL(os.environ["HOOK"])
failures = 0
for nth, keep in itertools.product(range(1, 1000), [False, True]):
    weights = [weight.clone() for weight in before]
    merger = cpu.CpuMerge(plan_of(weights), weights, [0, 60, 140])
    kept = [bytearray()] if keep else None
    call = (merger._table, merger._limits(-1.0), None, None, 5, 3, 2**23, 0.8, True, 1, None, kept)
    hook.fail_malloc(nth)
    try:
        kernel.merge(*call)
    except MemoryError:
        assert hook.stop_failing() == 1, nth
        failures += 1
        same = before
    else:
        assert hook.stop_failing() == 0, nth
        same = expected
    assert all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(weights, same)), nth
    if same is expected and keep:
        break
print(failures)
"""
    hook = cpu_kernel.build_library("failing_malloc.c")
    # Python's own allocator would ask for memory only now and then.
    failures = int(in_a_process(code, LD_PRELOAD=str(hook), HOOK=str(hook), PYTHONMALLOC="malloc"))
    assert failures >= 10
