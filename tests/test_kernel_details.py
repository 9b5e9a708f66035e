"""What only a look at every access, at the limits and at the buffers shows of the kernels and their launcher."""

import importlib.util

import numpy as np
import pytest
import torch
from oracle import bits
from torch import nn

from inmerge_fast import MergePlan, draw, reference_merge
from inmerge_fast.effect import similarity_of

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

import triton  # noqa: E402
from interleave import interleaved  # noqa: E402
from interpreter import Observer, apply_fixes, bounds, memory_span, observe, traffic  # noqa: E402
from test_kernels import (  # noqa: E402
    ALPHA,
    TABLES,
    alike,
    anyhow,
    assert_merged_and_clean,
    cycle,
    give_partners,
    launcher_of,
    merge_with_table,
    partners_of,
    tensors_of,
)

from inmerge_fast.kernels import merge  # noqa: E402
from inmerge_fast.paths import cpu  # noqa: E402
from inmerge_fast.paths.choice import Paths  # noqa: E402
from inmerge_fast.paths.triton.handle import Arguments, Handle  # noqa: E402
from inmerge_fast.paths.triton.launch import Launcher  # noqa: E402
from inmerge_fast.paths.triton.layer_table import can_merge  # noqa: E402

CALL = {"alpha": ALPHA, "threshold": -1.0}


@pytest.fixture(autouse=True)
def _interpreter():
    apply_fixes()


def reading_back(n):
    """A cycle whose rows each read the one before: taken in order, no row but the last finds its reader through."""
    return [n - 1, *range(n - 1)]


@pytest.mark.parametrize(
    ("elements", "dtype", "units"), [(20, torch.float32, 5), (33, torch.bfloat16, 5), (8, torch.float16, 1)]
)
@pytest.mark.parametrize("capacity", [0, 4, 5, 9, 10, 30])
def test_scratch_is_used_to_its_last_unit_and_not_beyond(capacity, elements, dtype, units):
    weights = [alike(9, elements, dtype)]
    launcher = launcher_of(weights)
    launcher.reserve_scratch(1.0)
    scratch = launcher.scratch
    with traffic(scratch=[scratch], beyond=[scratch[16 * capacity :]]) as moved:
        expected = merge_with_table(launcher, weights, [reading_back(9)], programs=1, capacity=capacity)
    assert_merged_and_clean(launcher, weights, expected)
    assert moved["scratch"].bytes_stored == weights[0][0].nbytes * min(8, capacity // units)
    assert moved["beyond"].bytes_stored == 0


def test_rows_whose_readers_are_through_are_written_at_once():
    weights = [alike(9, 20)]
    launcher = launcher_of(weights)
    launcher.reserve_scratch(1.0)
    with traffic(scratch=[launcher.scratch]) as moved:
        expected = merge_with_table(launcher, weights, [cycle(9, None)], programs=1)
    assert_merged_and_clean(launcher, weights, expected)
    assert moved["scratch"].bytes_stored == weights[0][0].nbytes, "only the first row comes before its reader"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_no_interleaving_of_a_dry_run_races(table):
    """With more programs than rows: those that find no row do nothing but take a ticket at the end."""
    rng = np.random.default_rng(2)
    for seed in range(2):
        weights = [alike(6, 12, seed=seed)]
        launcher = launcher_of(weights)
        launcher.reserve_scratch(1.0)
        before = weights[0].clone()
        with interleaved(seed, tensors=tensors_of(launcher, weights)) as schedule:
            for _ in range(2):
                give_partners(launcher, table(6, rng))
                launcher.merge_drawn(0, **CALL, dry_run=True, BLOCK=8, programs=8)
        assert not schedule.races, schedule.races[:3]
        assert_merged_and_clean(launcher, weights, [before])


class _StoresAwaitingABarrier(Observer):
    """What one program stored since its last barrier; a scalar atomic hands its result around behind one."""

    def __init__(self, *stored_by_an_earlier_launch):
        self.earlier = [memory_span(tensor) for tensor in stored_by_an_earlier_launch]
        self.stored, self.loaded_too_soon = set(), 0

    def access(self, access):
        addresses = set(access.addresses.tolist())
        if access.op == "atomic" and access.is_scalar:
            self.stored.clear()
        elif access.op == "store":
            self.stored |= {x for x in addresses if not any(start <= x < end for start, end in self.earlier)}
        else:
            self.loaded_too_soon += len(self.stored & addresses)

    def barrier(self):
        self.stored.clear()


@pytest.mark.parametrize("capacity", [0, 12, 1000])
def test_no_program_loads_what_its_other_threads_may_still_be_storing(capacity):
    """The race detector looks at pairs of programs only. With one program all of it is between threads."""
    rng = np.random.default_rng(3)
    for table in TABLES:
        weights = [alike(9, 20), alike(7, 33, torch.bfloat16)]
        launcher = launcher_of(weights)
        partners = [table(len(weight), rng) for weight in weights]
        awaiting = _StoresAwaitingABarrier(launcher.slot_of(0).active)
        with observe(awaiting):
            expected = merge_with_table(launcher, weights, partners, BLOCK=16, programs=1, capacity=capacity)
        assert_merged_and_clean(launcher, weights, expected)
        assert awaiting.loaded_too_soon == 0, table.__name__


@pytest.mark.parametrize("prob", [0.0, 0.5])
def test_accesses_are_in_bounds_where_some_rows_are_inactive(prob):
    weights = [alike(40, 20), alike(30, 7, torch.bfloat16)]
    launcher = launcher_of(weights)
    launcher.reserve_scratch(prob)
    with bounds(*tensors_of(launcher, weights).values()):
        for step in range(3):
            launcher.run(1, step, prob=prob, **CALL, dry_run=False)


STRIDED = {
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2),  # filters of whole 16 bytes, yet not dense
    "grouped transposed": lambda: nn.ConvTranspose2d(8, 6, 3, groups=2),
    "transposed bfloat16": lambda: nn.ConvTranspose1d(3, 7, 2).bfloat16(),
    "channels_last transposed": lambda: nn.ConvTranspose2d(4, 6, 3).half().to(memory_format=torch.channels_last),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
}


@pytest.mark.parametrize("capacity", [0, 8, 1000])
@pytest.mark.parametrize("name", STRIDED)
def test_any_table_of_strided_filters_whatever_the_scratch(name, capacity):
    """Written at once, through scratch, by whoever settles them, or as a cycle at the end."""
    rng = np.random.default_rng(4)
    module = STRIDED[name]()
    layout = {"groups": module.groups, "transposed": module.transposed}
    launcher = launcher_of([module])
    weight = module.weight.detach()
    for table in (cycle, lambda n, _: reading_back(n), anyhow):
        partner = np.array(table(launcher.rows, rng))
        expected = reference_merge(weight, partner >= 0, partner, **CALL, **layout).weight
        give_partners(launcher, partner)
        launcher.reserve_scratch(1.0)
        launcher.merge_drawn(0, **CALL, dry_run=False, BLOCK=16, programs=3, capacity=capacity)
        assert_merged_and_clean(launcher, [weight], [expected])


# ------------------------------------------------------------------------------------------------------------- scratch


def needed_scratch(filters, prob, layers):
    """Rows that merge and are read, on a mean draw of these layers."""
    draws = [draw(1, 2, layer, filters, prob) for layer in range(layers)]
    return sum(len(set(partner[coin]) & set(np.flatnonzero(coin))) for coin, partner in draws)


@pytest.mark.parametrize("prob", [0.1, 0.3, 0.6, 1.0])
def test_an_ordinary_draw_fits_into_scratch(prob):
    filters, elements, layers = 512, 4608, 6
    launcher = launcher_of([torch.empty(filters, elements) for _ in range(layers)])
    launcher.reserve_scratch(prob)
    assert launcher.scratch.numel() >= needed_scratch(filters, prob, layers) * elements * 4
    assert launcher.scratch.numel() <= 1.25 * launcher.bytes


def test_scratch_grows_with_prob_and_the_kernels_get_the_new_one():
    filters, elements = 128, 1024
    weights, twins = [alike(filters, elements)], [alike(filters, elements)]
    launcher, twin = launcher_of(weights), launcher_of(twins)
    launcher.run(1, 0, prob=0.1, **CALL, dry_run=False, programs=1)
    small = launcher.scratch
    launcher.reserve_scratch(1.0)
    assert launcher.scratch.numel() > small.numel()
    with bounds(*tensors_of(launcher, weights).values()), traffic(new=[launcher.scratch], old=[small]) as moved:
        launcher.run(1, 1, prob=1.0, **CALL, dry_run=False, programs=1)
    assert moved["new"].bytes_stored > 0
    assert moved["old"].bytes_stored == 0
    for step, prob in enumerate((0.1, 1.0)):
        twin.run(1, step, prob=prob, **CALL, dry_run=False, capacity=0)
    assert torch.equal(bits(weights[0]), bits(twins[0]))


def test_rows_that_find_the_launchers_own_scratch_full_wait():
    filters, elements = 128, 1024
    weights = [alike(filters, elements)]
    launcher = launcher_of(weights)
    launcher.reserve_scratch(0.1)
    rows_that_fit = launcher.scratch.numel() // (4 * elements)
    assert 0 < rows_that_fit < filters // 2
    before = weights[0].clone()
    partner = torch.tensor(reading_back(filters))
    give_partners(launcher, partner)
    with bounds(*tensors_of(launcher, weights).values()), traffic(scratch=[launcher.scratch]) as moved:
        launcher.merge_drawn(0, **CALL, dry_run=False, programs=1)
    assert moved["scratch"].bytes_stored == 4 * elements * rows_that_fit
    assert_merged_and_clean(launcher, weights, [ALPHA * before + (1 - ALPHA) * before[partner]])


def test_buffers_outlive_the_inference_mode_that_they_were_made_in():
    weights = [alike(9, 20)]
    with torch.inference_mode():
        launcher = launcher_of(weights)
        launcher.run(1, 0, prob=1.0, **CALL, dry_run=True)
    held = tensors_of(launcher, [])
    assert {"scratch", "call", "times"} <= held.keys()
    assert not [name for name, tensor in held.items() if tensor.is_inference()]


# -------------------------------------------------------------------------------------------------------------- limits


def test_a_layer_has_fewer_filters_than_the_flag():
    flag = merge.FLAG.value
    assert can_merge(MergePlan(torch.empty(flag - 1, 1)).layers)
    assert not can_merge(MergePlan(torch.empty(flag, 1)).layers)
    assert not can_merge(MergePlan([torch.empty(4, 8), torch.empty(4, 8, dtype=torch.float64)]).layers)


def test_a_plan_has_fewer_rows_than_2_to_the_31():
    with pytest.raises(ValueError, match="2147483648 filters, the kernels number them with 32 bits"):
        Launcher([], [torch.empty(4, 8)], np.array([0, 2**31]))


def test_there_are_never_more_programs_than_rows_nor_none():
    for filters in (2, 3, 4, 9):
        assert launcher_of([torch.empty(filters, 8)]).programs == min(4, filters)


# --------------------------------------------------------------------------------------------------- the path of a plan


class _OtherDevice:
    type = "xpu"

    def __str__(self):
        return "xpu:0"


@pytest.mark.parametrize(
    ("interpret", "force_eager", "change", "path", "reason"),
    [
        ("1", None, None, "triton", "interpreted, INMERGE_INTERPRET is set"),
        ("1", "0", None, "triton", "interpreted, INMERGE_INTERPRET is set"),
        ("1", "", None, "triton", "interpreted, INMERGE_INTERPRET is set"),
        ("1", "1", None, "eager", "INMERGE_FORCE_EAGER is set"),
        (None, None, None, "cpu", "device cpu"),
        ("0", None, None, "cpu", "device cpu"),
        ("", None, None, "cpu", "device cpu"),
        (None, "1", None, "eager", "INMERGE_FORCE_EAGER is set"),
        (None, None, "no compiler", "eager", "the CPU kernel cannot be used: it was not built"),
        ("1", None, "float64", "eager", "float64 layers, or layers of 2**20 filters and more"),
        ("1", None, "other device", "eager", "device xpu:0"),
        ("1", None, "CUDA", "triton", "device cuda:0"),
        (None, None, "CUDA", "triton", "device cuda:0"),
        (None, "1", "CUDA", "eager", "INMERGE_FORCE_EAGER is set"),
        (None, None, "CUDA without Triton", "eager", "Triton is not installed"),
    ],
)
def test_every_path_and_its_reason(monkeypatch, interpret, force_eager, change, path, reason):
    for name, value in (("INMERGE_INTERPRET", interpret), ("INMERGE_FORCE_EAGER", force_eager)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    conv = nn.Conv2d(3, 4, 3)
    plan = MergePlan(conv.double() if change == "float64" else conv)
    if change == "other device":
        monkeypatch.setattr(plan.rows, "device", _OtherDevice())
    elif change is not None and change.startswith("CUDA"):
        monkeypatch.setattr(plan.rows, "device", torch.device("cuda:0"))
        if change.endswith("without Triton"):
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    why = "it was not built" if change == "no compiler" else ""
    monkeypatch.setattr(cpu, "unavailable", lambda: why)
    plan.paths = Paths(plan.rows)
    for _ in range(2):
        assert (plan.path, plan.path_reason) == (path, reason)


def test_a_plan_keeps_its_launcher():
    weight = alike(9, 20)  # a plan does not keep its target alive
    plan = MergePlan(weight)
    assert plan.paths.triton.launcher(plan.weights()) is plan.paths.triton.launcher(plan.weights())


def test_seed_zero_is_a_seed_and_not_the_one_in_device_memory():
    weights = [alike(9, 20)]  # a launcher does not keep them alive
    launcher = launcher_of(weights)
    launcher.prepare(5, 6, prob=0.7, alpha=ALPHA, threshold=-1.0, write=True)
    launcher.run(0, 3, prob=0.7, **CALL, dry_run=True)
    coin, partner = draw(0, 3, 0, 9, 0.7)
    assert partners_of(launcher).tolist() == np.where(coin, partner, -1).tolist()


def test_a_kernel_with_other_constants_is_another_kernel():
    launcher = launcher_of([alike(9, 20)])
    usual = launcher._merge_handle({})
    assert launcher._merge_handle({"BLOCK": 8}) is not usual
    assert launcher._merge_handle({"BLOCK": 8})._constants["BLOCK"] == 8
    assert launcher._merge_handle({}) is usual
    tuned = launcher._merge_handle({"num_warps": 8})
    assert tuned._options == usual._options | {"num_warps": 8}
    assert tuned._constants == usual._constants


class _CountingKernel(triton.JITFunction):
    """A kernel that only counts how often it is looked up and launched; its own compiled form."""

    function = packed_metadata = None

    def __init__(self):
        self.warmups, self.runs = 0, []

    def warmup(self, *arguments, grid, **options):
        self.warmups += 1
        return self

    def _init_handles(self):
        pass

    def run(self, *arguments):
        self.runs.append(arguments)


def test_a_handle_looks_its_kernel_up_once():
    kernel, tensor = _CountingKernel(), torch.zeros(4)
    handle = Handle(kernel, {"BLOCK": 8}, {"maxnreg": 80})
    for number in (7, 8):
        handle.launch((3, 2), 5, Arguments(tensor), (number,))
    assert kernel.warmups == 1
    assert kernel.runs == [(3, 2, 1, 5, *[None] * 5, tensor.data_ptr(), number, 8) for number in (7, 8)]


# ------------------------------------------------------------------------------------------------------ running totals


@pytest.mark.parametrize("partner", ["random", "similar"])
def test_running_counts_are_of_the_calls_that_may_write(partner):
    """Also of filters that found no partner, which no merge sees."""
    weights = [alike(9, 20), torch.randn(40, 100)]
    weights[0][4, 3] = torch.nan
    launcher = launcher_of(weights)
    untouched = launcher.running.largest.tolist()
    call = {"prob": 0.9, "alpha": ALPHA, "threshold": 0.2, "partner": partner}
    dry = launcher.run(1, 0, **call, dry_run=True).fetch()
    assert np.isnan(dry.similarity).any()
    assert launcher.running.largest.tolist() == untouched
    assert not launcher.running.times.any()
    counts, largest = np.zeros((2, 2), int), -np.inf
    for step in range(5):
        pairs = launcher.run(1, step, **call, dry_run=False).fetch()
        largest = np.fmax(largest, np.float32(np.nanmax(pairs.similarity)))
        passed = np.split(pairs.passed, [pairs.counts[0]])
        counts += np.stack([pairs.counts, [p.sum() for p in passed]], 1)
    assert similarity_of(int(launcher.running.largest)) == largest > 0
    assert launcher.running.by_layer().tolist() == counts.tolist()
    assert (counts[:, 1] > 0).all()
    assert (counts[:, 1] < counts[:, 0]).all()
    launcher.running.reset()
    assert (int(launcher.running.largest), int(launcher.running.times.sum())) == (untouched[0], 0)
