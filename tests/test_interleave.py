"""The tools that test the kernels on a CPU, tested on kernels that are wrong on purpose."""

import warnings

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("interpreter")
interleave = pytest.importorskip("interleave")

pytestmark = pytest.mark.interpreted

PROGRAMS, LENGTH = 6, 20
SEEDS = range(10)


@pytest.fixture(autouse=True)
def _fixed_interpreter():
    interpreter.apply_fixes()


def zeros(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


@triton.jit
def _copy_kernel(target, source, length, extra_load, extra_store, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(source + i, mask=i < length + extra_load)
    tl.store(target + i, value.to(target.dtype.element_ty), mask=i < length + extra_store)


@triton.jit
def _shift_kernel(rows, length, BLOCK: tl.constexpr):
    """Each program overwrites its row with the next one: every row but the first is read and written at will."""
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    after = tl.load(rows + (pid + 1) * length + i, mask=i < length)
    tl.store(rows + pid * length + i, after, mask=i < length)


@triton.jit
def _leave(counter, BARRIER: tl.constexpr, SEM: tl.constexpr):
    if BARRIER:
        tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem=SEM) + 1


@triton.jit
def _last_out_kernel(row, counter, programs, length, BLOCK: tl.constexpr, BARRIER: tl.constexpr, SEM: tl.constexpr):
    """All read the row, the last to have done so overwrites it."""
    i = tl.arange(0, BLOCK)
    value = tl.load(row + i, mask=i < length)
    if _leave(counter, BARRIER, SEM) == programs:
        tl.store(row + i, value + 1, mask=i < length)


@triton.jit
def _mixed_kernel(word, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Two programs, each using the word in its own way."""
    for pid in tl.static_range(2):
        if tl.program_id(0) == pid:
            way = FIRST if pid == 0 else SECOND
            if way == "atomic":
                tl.atomic_add(word, 1)
            elif way == "load":
                tl.load(word)
            else:
                tl.store(word, 7)


@triton.jit
def _meet_kernel(counter, programs):
    """A grid barrier: hangs unless all programs are in flight."""
    tl.atomic_add(counter, 1)
    while tl.atomic_add(counter, 0) < programs:
        pass


@triton.jit
def _sign_in_kernel(counter, order, present, peak):
    """Programs note their number, and how many are at it."""
    here = tl.atomic_add(present, 1) + 1
    tl.atomic_max(peak, here)
    place = tl.atomic_add(counter, 1)
    pid = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(order + place, pid)
    tl.atomic_add(present, -1)


@triton.jit
def _arithmetic_kernel(out, source, length, on, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = 0
    for start in range(0, length, BLOCK):
        mask = (start + i < length) & (on > 0)
        total += tl.sum(tl.load(source + start + i, mask=mask, other=0), axis=0)
    tl.store(out, total)


@triton.jit
def _float_kernel(out, values):
    x = tl.load(values)
    y = tl.load(values + 1)
    tl.store(out, tl.maximum(x, y))
    tl.store(out + 1, tl.minimum(x, y))
    tl.store(out + 2, tl.load(values + 2) - tl.load(values + 2))


# -------------------------------------------------------------------------------------------------------------- fixes


def convert(values, dtype):
    result = torch.empty(values.shape, dtype=dtype)
    _copy_kernel[(1,)](result, values, values.numel(), 0, 0, BLOCK=triton.next_power_of_2(values.numel()))
    return result


def test_rounding_to_bfloat16_is_torchs():
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)  # below, at and above a tie
    values = torch.from_numpy((upper[:, None] | lower).ravel().view(np.float32))
    ours, torchs = convert(values, torch.bfloat16), values.to(torch.bfloat16)
    nan = torchs.isnan()
    assert nan.sum() == 2 * (127 * 6 + 5)
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours.view(torch.int16)[~nan], torchs.view(torch.int16)[~nan])


def test_expanding_bfloat16_is_exact():
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(convert(values, torch.float32).view(torch.int32), values.float().view(torch.int32))


@pytest.mark.parametrize(("on", "expected"), [(1, sum(range(37))), (0, 0)])
def test_runtime_range_and_mask_of_block_and_scalar(on, expected):
    out = zeros(1)
    _arithmetic_kernel[(1,)](out, torch.arange(37, dtype=torch.int32), 37, on, BLOCK=8)
    assert out.item() == expected


def test_maximum_and_minimum_drop_nan_and_infinities_do_not_warn():
    out = torch.zeros(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _float_kernel[(1,)](out, torch.tensor([float("nan"), 2.0, float("inf")]))
        with interleave.interleaved(0):
            _float_kernel[(1,)](out, torch.tensor([2.0, float("nan"), float("inf")]))
    assert out[:2].tolist() == [2, 2]
    assert out[2].isnan()


def test_triton_is_unpatched_after_a_launch():
    def builtins():
        return [
            name
            for place in (tl, tl.core, tl.tensor)
            for name in dir(place)
            if tl.core.is_builtin(place.__dict__.get(name))
        ]

    before = builtins()
    methods = dict(vars(triton.runtime.interpreter.InterpreterBuilder))
    row = zeros(LENGTH)
    with interleave.interleaved(0), interpreter.bounds(row), pytest.raises(IndexError):
        _last_out_kernel[(2,)](row, zeros(1), 2, LENGTH, BLOCK=32, BARRIER=True, SEM="acq_rel")
    _last_out_kernel[(2,)](row, zeros(1), 2, LENGTH, BLOCK=32, BARRIER=True, SEM="acq_rel")
    assert builtins() == before
    assert before
    assert dict(vars(triton.runtime.interpreter.InterpreterBuilder)) == methods


# ---------------------------------------------------------------------------------------------------- bounds, traffic


@pytest.mark.parametrize(
    ("extra_load", "extra_store", "message"),
    [(0, 0, None), (1, 0, "load of 4 bytes at 1 of 21"), (0, 1, "store of 2 bytes at 1 of 21")],
)
def test_bounds(extra_load, extra_store, message):
    source, target = torch.ones(LENGTH + 5)[:LENGTH], torch.zeros(LENGTH + 5, dtype=torch.float16)[:LENGTH]

    def copy():
        _copy_kernel[(1,)](target, source, LENGTH, extra_load, extra_store, BLOCK=32)

    copy()  # it is not noticed otherwise
    with interpreter.bounds(target, source):
        if message is None:
            copy()
        else:
            with pytest.raises(IndexError, match=message):
                copy()


def test_bounds_of_atomics_and_of_views():
    storage = zeros(4, 6)
    with interpreter.bounds(storage.t()[1:3], storage[2, 3]):
        for element in (1, 20, 15):
            _mixed_kernel[(1,)](storage.view(-1)[element:], FIRST="atomic", SECOND="atomic")
        for element in (0, 21):
            with pytest.raises(IndexError, match="atomic of 4 bytes"):
                _mixed_kernel[(1,)](storage.view(-1)[element:], FIRST="atomic", SECOND="atomic")


def test_traffic_is_exact():
    source, target = torch.ones(LENGTH), torch.zeros(LENGTH, dtype=torch.float16)
    counter = zeros(1)
    with interpreter.traffic(floats=[source], both=[source, target], counters=[counter]) as moved:
        for _ in range(3):
            _copy_kernel[(1,)](target, source, LENGTH, 0, -2, BLOCK=32)
        _meet_kernel[(1,)](counter, 1)
    assert (moved.bytes_loaded, moved.bytes_stored, moved.atomics) == (3 * 4 * LENGTH, 3 * 2 * (LENGTH - 2), 2)
    assert moved["floats"] == interpreter.Counts(3 * 4 * LENGTH, 0, 0)
    assert moved["both"] == interpreter.Counts(3 * 4 * LENGTH, 3 * 2 * (LENGTH - 2), 0)
    assert moved["counters"] == interpreter.Counts(0, 0, 2)


def test_instruments_work_together():
    row, counter = zeros(LENGTH), zeros(1)
    with (
        interpreter.bounds(row, counter),
        interpreter.traffic(row=[row]) as moved,
        interleave.interleaved(1) as schedule,
    ):
        _last_out_kernel[(PROGRAMS,)](row, counter, PROGRAMS, LENGTH, BLOCK=32, BARRIER=True, SEM="acq_rel")
    assert moved["row"] == interpreter.Counts(4 * LENGTH * PROGRAMS, 4 * LENGTH, 0)
    assert schedule.steps == 2 * PROGRAMS + 1
    assert not schedule.races


# --------------------------------------------------------------------------------------------------------- schedules


def sign_in(grid, context):
    programs = int(np.prod(grid))
    order, peak = zeros(programs), zeros(1)
    with context as seen:
        _sign_in_kernel[grid](zeros(1), order, zeros(1), peak)
    return order.tolist(), peak.item(), seen


@pytest.mark.parametrize("grid", [(7,), (2, 3, 2)])
def test_permuted_runs_every_program_once_in_random_order(grid):
    programs = list(range(int(np.prod(grid))))
    orders = set()
    for seed in SEEDS:
        order, peak, done = sign_in(grid, interleave.permuted(seed))
        assert peak == 1
        assert sorted(order) == programs
        shape = grid + (1,) * (3 - len(grid))
        assert [int(np.ravel_multi_index(index, shape)) for index in done] == order
        assert order == sign_in(grid, interleave.permuted(seed))[0]
        orders.add(tuple(order))
    assert len(orders) > len(SEEDS) // 2
    assert sign_in(grid, interpreter.traffic())[0] == programs


@pytest.mark.parametrize("grid", [(7,), (2, 3, 2)])
def test_interleaved_runs_programs_at_the_same_time(grid):
    programs = list(range(int(np.prod(grid))))
    peaks = []
    for seed in SEEDS:
        order, peak, schedule = sign_in(grid, interleave.interleaved(seed))
        assert sorted(order) == programs
        peaks.append(peak)
        assert not schedule.races
        assert order == sign_in(grid, interleave.interleaved(seed))[0]
        assert sign_in(grid, interleave.interleaved(seed, resident=2))[1] <= 2
        assert sign_in(grid, interleave.interleaved(seed, resident=1))[1] == 1
    assert max(peaks) > 2


def test_deadlock_is_noticed():
    for seed in SEEDS:
        with interleave.interleaved(seed):
            _meet_kernel[(3,)](zeros(1), 3)
        with interleave.interleaved(seed, resident=2, max_steps=200), pytest.raises(RuntimeError, match="deadlock"):
            _meet_kernel[(3,)](zeros(1), 3)


# -------------------------------------------------------------------------------------------------------------- races


def kinds(launch, **options):
    """The kinds of races found in some schedules, and the number of schedules with a race."""
    found, count = set(), 0
    for seed in SEEDS:
        with interleave.interleaved(seed, **options) as schedule:
            launch()
        found |= {race.kind for race in schedule.races}
        count += bool(schedule.races)
    return found, count


def test_racy_copy_is_reported():
    rows = zeros(PROGRAMS + 1, LENGTH)
    found, count = kinds(lambda: _shift_kernel[(PROGRAMS,)](rows, LENGTH, BLOCK=32))
    assert found == {"R-W", "W-R"}
    assert count == len(SEEDS)
    with interleave.interleaved(0, tensors={"rows": rows}) as schedule:
        _shift_kernel[(PROGRAMS,)](rows, LENGTH, BLOCK=32)
    assert len(schedule.races) == PROGRAMS - 1
    for race in schedule.races:
        row = max(race.earlier, race.later)  # its owner, which the program before reads it from
        assert abs(race.earlier - race.later) == 1
        assert (race.where, race.elements) == (f"rows[{row}, 0]", LENGTH)
        assert race.address == rows[row].data_ptr()
        assert str(race) == f"{race.kind} at rows[{row}, 0] and 19 more: program {race.earlier}, then {race.later}"


def test_all_writing_one_place_is_reported():
    row = zeros(LENGTH)
    found, count = kinds(lambda: _copy_kernel[(2,)](row, zeros(LENGTH), LENGTH, 0, 0, BLOCK=32))
    assert found == {"W-W"}
    assert count == len(SEEDS)


@pytest.mark.parametrize(
    ("barrier", "sem", "racy_in_36", "racy_in_37"),
    [
        (True, "acq_rel", False, False),
        (False, "acq_rel", True, False),
        (True, "relaxed", True, True),
        (True, "release", True, True),
        (True, "acquire", True, True),
    ],
)
def test_last_out(barrier, sem, racy_in_36, racy_in_37):
    row = zeros(LENGTH)

    def launch():
        _last_out_kernel[(PROGRAMS,)](row, zeros(1), PROGRAMS, LENGTH, BLOCK=32, BARRIER=barrier, SEM=sem)

    for barrier_before_release, racy in ((False, racy_in_36), (True, racy_in_37)):
        found, count = kinds(launch, barrier_before_release=barrier_before_release)
        assert found == ({"R-W"} if racy else set())
        assert count == (len(SEEDS) if racy else 0)
    assert row.tolist() == [2 * len(SEEDS)] * LENGTH


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("atomic", "atomic", set()),
        ("load", "load", set()),
        ("atomic", "load", {"A-R", "R-A"}),
        ("atomic", "store", {"A-W", "W-A"}),
        ("load", "store", {"R-W", "W-R"}),
    ],
)
def test_mixing_atomics_and_others(first, second, expected):
    word = zeros(1)
    assert kinds(lambda: _mixed_kernel[(2,)](word, FIRST=first, SECOND=second))[0] == expected
