"""Fixtures and process set-up that all tests share."""

import os

import pytest
import torch

from inmerge_fast import effect
from inmerge_fast.paths import cpu

try:
    import hypothesis
except ImportError:  # the files that need it skip themselves, so that a bare GPU machine can run all others
    hypothesis = None

HAS_GPU = torch.cuda.is_available()

# Triton decides at import whether its kernels are interpreted. Interpreted and compiled kernels cannot share a process,
# so without a GPU this one interprets, and with one the interpreted tests get a process of their own
# (test_interpreted.py).
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1" or not HAS_GPU
if INTERPRETING:
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
# GPU tests compare convolutions and gradients: in float32, and by the same algorithm each time.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.deterministic = True

CPU_KERNEL = not cpu.unavailable()

if hypothesis is not None:
    hypothesis.settings.register_profile("local", deadline=None, print_blob=True)
    hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("local"), derandomize=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(config, items):
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    not_here = pytest.mark.skip(reason="interpreted kernels run in their own process, see test_interpreted.py")
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(no_gpu)
        if "interpreted" in item.keywords and not INTERPRETING:
            item.add_marker(not_here)


def pytest_runtest_setup(item):
    if "gpu" in item.keywords and HAS_GPU and INTERPRETING:
        pytest.fail("TRITON_INTERPRET=1 is set: a GPU test would run interpreted kernels or none; unset it", False)


def pytest_unconfigure():
    effect._without_a_word.clear()  # most tests merge next to nothing, which is no news at the end of the process


def pytest_terminal_summary(terminalreporter):
    """Say how many tests ran on a GPU: where there is none, a green run says nothing about it."""

    def count(*outcomes):
        reports = [report for outcome in outcomes for report in terminalreporter.stats.get(outcome, [])]
        return len({report.nodeid for report in reports if "gpu" in getattr(report, "keywords", {})})

    if HAS_GPU:
        ran = count("passed", "failed", "error")
        terminalreporter.write_line(f"gpu tests run on {torch.cuda.get_device_name()}: {ran}")
    elif skipped := count("skipped"):
        terminalreporter.write_line(f"no CUDA device: {skipped} gpu tests skipped")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def full_device(request):
    """Every device for work of real size."""
    return torch.device(request.param)


@pytest.fixture(
    params=[
        "cpu",
        "eager",
        pytest.param("interpreted", marks=pytest.mark.interpreted),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request, monkeypatch):
    """Every way the op runs here: the CPU's kernel, PyTorch, the GPU's kernels in Triton's interpreter and on a GPU."""
    if request.param == "eager":
        if not CPU_KERNEL:
            pytest.skip("the CPU kernel is not built here, so that cpu is the eager path")
        monkeypatch.setenv("INMERGE_FORCE_EAGER", "1")
        yield torch.device("cpu")
        return
    if request.param != "interpreted":
        yield torch.device(request.param)
        return
    pytest.importorskip("triton")
    from interleave import permuted

    monkeypatch.setenv("INMERGE_INTERPRET", "1")
    with permuted(seed=len(request.node.name)):  # nothing may depend on the order of programs
        yield torch.device("cpu")


@pytest.fixture(autouse=True)
def _fixed_global_state():
    torch.manual_seed(0)
    yield
    if torch.cuda.is_initialized() and torch.cuda.get_sync_debug_mode():
        torch.cuda.set_sync_debug_mode("default")  # or later tests of this process would fail as well
        pytest.fail("this test has left the mode on in which synchronising raises")
