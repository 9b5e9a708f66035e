"""Every build of the CPU kernel gives the same bits: instruction sets, compilers, optimisation levels."""

import functools

import cpu_kernel
import pytest
import torch
from cpu_kernel import DTYPES, bytes_of, run, similar_filters
from oracle import bits
from torch import nn

VARIANTS = {
    "gcc -O0": ("gcc", "-O0"),
    "gcc -O2": ("gcc", "-O2"),
    "gcc -O3, threads": ("gcc", "-O3", "-fopenmp"),
    "gcc -O3, all of this processor": ("gcc", "-O3", "-march=native"),
    "gcc -O3, no vector types": ("gcc", "-O3", "-DINMERGE_PLAIN_C"),
    "clang -O0": ("clang", "-O0"),
    "clang -O3": ("clang", "-O3"),
}
SHAPES = [(200, 1), (300, 37), (200, 576), (60, 9999)]


def outcome(dtype, code=None):
    """Results and weights of calls that pass, do not pass, and look at strided filters."""
    weights = [similar_filters(*shape, dtype=dtype, seed=index) for index, shape in enumerate(SHAPES)]
    conv = nn.ConvTranspose2d(24, 32, 3, groups=2).to(dtype)
    with torch.no_grad():
        conv.weight.copy_(similar_filters(24, 16, 3, 3, dtype=dtype, special=False))
    found = []
    for threshold in (0.45, -1.0):
        found += bytes_of(run([*weights, conv], code=code, prob=0.7, thresholds=threshold))
    return [*found, *(bits(weight).numpy().tobytes() for weight in [*weights, conv.weight])]


@functools.cache
def expected(dtype):
    """What setup.py's build does with the plainest instructions that it has."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        cpu_kernel.use(monkeypatch)
        torch.manual_seed(0)
        return outcome(dtype, "portable")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", ["avx512", "avx2", None])
def test_every_instruction_set_gives_the_same_bits(monkeypatch, code, dtype):
    kernel = cpu_kernel.use(monkeypatch)
    if code and code not in kernel.code_names:
        pytest.skip(f"this processor has no {code}")
    assert outcome(dtype, code) == expected(dtype)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_compiler_gives_the_same_bits(monkeypatch, name):
    kernel = cpu_kernel.use(monkeypatch, cpu_kernel.build_variant(*VARIANTS[name]))
    for code in kernel.code_names:
        for dtype in DTYPES:
            assert outcome(dtype, code) == expected(dtype), f"{code}, {dtype}"


def test_the_best_instruction_set_comes_first(monkeypatch):
    kernel = cpu_kernel.use(monkeypatch)
    order = ["avx512", "avx2", "portable"]
    assert kernel.code_names == tuple(name for name in order if name in kernel.code_names)
    assert "portable" in kernel.code_names
    has = torch.backends.cpu.get_cpu_capability()
    assert ("avx512" in kernel.code_names) == (has == "AVX512")
    assert ("avx2" in kernel.code_names) == (has in ("AVX2", "AVX512"))
