"""``InMerge`` on the kernels: draws ahead, numbers in device memory, CUDA graphs."""

import pytest
import torch
from on_gpu import synchronising_raises
from oracle import assert_same_bits
from test_training import batches, loss_of, net
from torch import nn

from inmerge_fast import DictLogger, InMerge, NoiseThreshold, linear

pytest.importorskip("triton")
RECIPE = {"alpha": linear(0.9, 0.5, end=8), "prob": linear(0.3, 0.9, end=8), "threshold": NoiseThreshold(0.3),
          "skip_first": 0, "start": 1, "stop": 8, "every": 2, "seed": 2**63 + 11}  # fmt: skip


def twins(device):
    first, second = net().to(device), net().to(device)
    second.load_state_dict(first.state_dict())
    return first, second


def assert_same_weights(first, second):
    for name, value in first.state_dict().items():
        assert_same_bits(value, second.state_dict()[name], name)


def test_kernels_and_eager_path_walk_the_same_way(device, monkeypatch):
    """Draws ahead, per-layer thresholds, schedules; every step's statistics too."""
    model, twin = twins(device)
    log, same = DictLogger(), DictLogger()
    merger = InMerge(model, loggers=[log], observe_every=1, **RECIPE)
    rows = [merger.step() for _ in range(9)]
    merger.flush()
    monkeypatch.setenv("INMERGE_FORCE_EAGER", "1")
    eager = InMerge(twin, loggers=[same], observe_every=1, **RECIPE)
    assert eager.plan.path == "eager"
    expected = [eager.step() for _ in range(9)]
    eager.flush()
    assert [row is None for row in rows] == [row is None for row in expected]
    assert sum(row.merged for row in rows if row) > 10
    assert [row["merged"] for row in log.rows] == [row["merged"] for row in same.rows]
    assert [row["step"] for row in log.rows] == [1, 3, 5, 7]
    assert_same_weights(model, twin)


@pytest.mark.interpreted
def test_a_step_that_was_drawn_ahead_is_one_launch(monkeypatch):
    monkeypatch.setenv("INMERGE_INTERPRET", "1")
    merger = InMerge(net(), every=3, prob=lambda step: 0.5, skip_first=0)
    merger.step()
    launcher = merger.plan.paths.triton.launcher(merger.plan.weights())
    launched = []
    handles = {"_draw": launcher._draw, "_count": launcher._count, "_merge": launcher._merge_handle({})}
    for name, handle in handles.items():
        monkeypatch.setattr(
            handle, "launch", lambda *a, name=name, launch=handle.launch, **k: launched.append(name) or launch(*a, **k)
        )
    for _ in range(3 * 6):
        merger.step()
    assert launched == ["_draw", "_merge"] * 2 + ["_merge"] * 3 + ["_draw", "_merge"]


@pytest.mark.interpreted
def test_a_schedule_may_end_with_the_training(monkeypatch):
    """Its value for a step after the last one is nobody's business."""
    monkeypatch.setenv("INMERGE_INTERPRET", "1")
    probs = [0.5] * 4
    merger = InMerge(net(), prob=lambda step: probs[step], skip_first=0)
    assert [merger.step().sampled > 0 for _ in probs] == [True] * 4
    with pytest.raises(IndexError):
        merger.step()


@pytest.mark.interpreted
@pytest.mark.parametrize("partner", ["random", "nearest"])
def test_prepared_steps_are_the_same_steps(partner, monkeypatch):
    """What a graph replays, launch for launch: the numbers come from memory, also of steps that do not merge."""
    monkeypatch.setenv("INMERGE_INTERPRET", "1")
    model, twin = twins("cpu")
    log, same = DictLogger(), DictLogger()
    merger = InMerge(model, partner=partner, loggers=[log], observe_every=1, **RECIPE)
    plain = InMerge(twin, partner=partner, loggers=[same], observe_every=1, **RECIPE)
    with pytest.raises(RuntimeError, match="call prepare"):
        merger._graph.capture()
    merger.prepare()
    merger._graph.capture()  # in a graph this runs nothing; here it merges step 0, which is not one that merges
    assert merger.step_count == 0
    launcher = merger.plan.paths.triton.launcher(merger.plan.weights())
    for _ in range(9):
        merger.prepare()
        launcher.calls -= 1  # a replay leaves its statistics where the captured call did
        replayed = launcher.run_from_memory(partner=partner)
        stats = plain.step()
        assert replayed.fetch().counts.sum() == (stats.sampled if stats else 0)
    assert merger.step_count == plain.step_count == 9
    assert_same_weights(model, twin)
    merger.flush()
    plain.flush()
    assert sum(row["merged"] for row in log.rows) > 10
    assert log.rows == same.rows
    model[3].weight = nn.Parameter(model[3].weight.detach().clone())
    with pytest.raises(ValueError, match="after the capture; capture the graph again"):
        merger.prepare()


def test_graphs_need_the_kernels(monkeypatch):
    monkeypatch.setenv("INMERGE_FORCE_EAGER", "1")
    with pytest.raises(RuntimeError, match="CUDA graphs need the kernels.*INMERGE_FORCE_EAGER is set"):
        InMerge(net()).prepare()


@pytest.mark.gpu
@pytest.mark.parametrize("attached", [False, True])
def test_a_captured_training_step_replays_with_new_draws(attached):
    """Forward, backward, optimizer and merge in one graph, against the same steps run one by one."""
    model, twin = twins("cuda")
    data = [x.cuda() for x in batches(12)]

    def parts(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        merger = InMerge(module, **RECIPE | {"threshold": -1.0})  # no decision may hang on rounding
        return optimizer, merger.attach(optimizer) if attached else merger

    def step(module, optimizer, merger, x):
        optimizer.zero_grad(set_to_none=False)
        loss_of(module, x).backward()
        optimizer.step()
        if not attached:
            merger.step()

    optimizer, merger = parts(model)
    plain_optimizer, plain = parts(twin)
    static = data[0].clone()
    merger.detach()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up on both, so that both optimizers have the same state
        for module, chosen in ((model, optimizer), (twin, plain_optimizer)):
            for _ in range(2):
                loss_of(module, static).backward()
                plain.detach()
                chosen.step()
                chosen.zero_grad(set_to_none=False)
    torch.cuda.current_stream().wait_stream(stream)
    if attached:
        merger.attach(optimizer)
        plain.attach(plain_optimizer)
    merger.prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizer, merger, static)
    assert merger.step_count == 0
    for x in data:
        static.copy_(x)
        merger.prepare()
        graph.replay()
        step(twin, plain_optimizer, plain, x)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other)
    assert merger.step_count == plain.step_count == 12


@pytest.mark.gpu
def test_replayed_merges_alone_are_bit_equal():
    model, twin = twins("cuda")
    merger, plain = InMerge(model, **RECIPE), InMerge(twin, **RECIPE)
    merger.prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merger.step()
    for _ in range(10):
        merger.prepare()
        graph.replay()
        plain.step()
    assert_same_weights(model, twin)


@pytest.mark.gpu
def test_observing_does_not_wait_for_the_device():
    model = net().cuda()
    log = DictLogger()
    merger = InMerge(model, loggers=[log], observe_every=1, skip_first=0)
    for _ in range(3):
        merger.step()
    torch.cuda.synchronize()
    with synchronising_raises():
        for _ in range(10):
            merger.step()
    merger.flush()
    assert len(log.rows) == 13


@pytest.mark.gpu
def test_a_fused_optimizers_skipped_step_skips_the_merge():
    model = net().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    merger = InMerge(model, prob=1.0, threshold=-1.0).attach(optimizer)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    for factor, counted in ((1.0, 1), (torch.inf, 1), (1.0, 2)):
        scaler.scale(loss_of(model, batches(1)[0].cuda()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert merger.step_count == counted
