"""pytest-benchmark cases of what fits in a second: ``pytest benchmarks --benchmark-only``."""

import pytest
import torch

import inmerge_fast
from benchmarks import providers
from benchmarks.check import Checker
from benchmarks.timing import cold_cache, synchronize
from benchmarks.work import REGIMES, Settings

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
LAYERS = {"conv 128x128x3x3": [(128, 1152)], "eight convs 64x64x3x3": [(64, 576)] * 8}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "provider",
    [providers.PUBLISHED, providers.EAGER, providers.SAMPLED, providers.MERGE],
    ids=lambda provider: provider.name,
)
def test_merge(benchmark, provider, device, layers, regime):
    torch.manual_seed(0)
    device = torch.device(device)
    weights = [torch.randn(shape, device=device) for shape in LAYERS[layers]]
    plan = inmerge_fast.MergePlan(weights)
    Checker(plan).check(provider)
    call = provider.prepare(plan, Settings(REGIMES[regime]), None)
    kept = [weight.clone() for weight in weights]

    def restore():
        for weight, old in zip(weights, kept, strict=True):
            weight.copy_(old)
        cold_cache(device)()
        synchronize(device)

    def timed():
        call(0)
        synchronize(device)

    benchmark.group = f"{layers}, {regime}, {device}"
    benchmark.pedantic(timed, setup=restore, rounds=20, warmup_rounds=2)
