"""The rules of ``conftest.py``: a GPU test never passes on interpreted kernels, and the summary says what ran where."""

from types import SimpleNamespace

import conftest
import pytest
import torch


class Item:
    def __init__(self, *keywords):
        self.keywords, self.markers = set(keywords), []

    def add_marker(self, marker):
        self.markers.append(marker.name)


@pytest.mark.parametrize(
    ("has_gpu", "interpreting", "gpu_test", "interpreted_test"),
    [(False, True, ["skip"], []), (True, False, [], ["skip"]), (True, True, [], [])],
)
def test_where_tests_run(monkeypatch, has_gpu, interpreting, gpu_test, interpreted_test):
    monkeypatch.setattr(conftest, "HAS_GPU", has_gpu)
    monkeypatch.setattr(conftest, "INTERPRETING", interpreting)
    items = [Item("gpu"), Item("interpreted"), Item()]
    conftest.pytest_collection_modifyitems(None, items)
    assert [item.markers for item in items] == [gpu_test, interpreted_test, []]


def test_a_gpu_test_fails_where_kernels_are_interpreted(monkeypatch):
    monkeypatch.setattr(conftest, "HAS_GPU", True)
    monkeypatch.setattr(conftest, "INTERPRETING", True)
    with pytest.raises(pytest.fail.Exception, match="TRITON_INTERPRET=1 is set"):
        conftest.pytest_runtest_setup(Item("gpu"))
    conftest.pytest_runtest_setup(Item("interpreted"))
    monkeypatch.setattr(conftest, "INTERPRETING", False)
    conftest.pytest_runtest_setup(Item("gpu"))


@pytest.mark.parametrize("has_gpu", [True, False])
def test_the_summary_counts_the_tests_of_the_device(monkeypatch, has_gpu):
    def reports(*names, gpu):
        return [SimpleNamespace(nodeid=name, keywords={"gpu": 1} if gpu else {}) for name in names]

    stats = {
        "passed": [*reports("a", "b", "b", gpu=True), *reports("c", gpu=False)],
        "failed": reports("d", gpu=True),
        "skipped": [*reports("e", gpu=True), *reports("f", gpu=False)],
    }
    lines = []
    monkeypatch.setattr(conftest, "HAS_GPU", has_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    conftest.pytest_terminal_summary(SimpleNamespace(stats=stats, write_line=lines.append))
    assert lines == ["gpu tests run on Some GPU: 3" if has_gpu else "no CUDA device: 1 gpu tests skipped"]


def test_convolutions_are_exact_and_repeatable():
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == "highest"
