"""PyTorch's own streams, events and graphs, over a CUDA runtime in host memory that tells what happens in which order.

It shows which stream waits for which, and what is asked for inside a capture. It cannot show that a wait holds work up:
all work is done at once, and that of kernels not at all; for that there is test_gpu_runtime.py.
"""

import pytest

pytest.importorskip("triton")
import stub

pytestmark = pytest.mark.skipif(
    stub.compiler() is None or stub.runtime_headers() is None, reason="needs gcc and a CUDA 13 build of PyTorch"
)


@pytest.fixture(scope="module")
def on_stub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stub")
    return stub.run("torch_on_stub.py", env=stub.environment_over_stub(folder, runtime=True))


def test_a_call_waits_for_the_default_stream_and_for_any_other(on_stub):
    """From 0, its handle, PyTorch below 2.14 makes a new stream."""
    seen = on_stub["calls_on_two_streams"]
    side = seen["side"]
    assert side > 0
    assert seen["to side"][:2] == [["record", 0], ["wait", side, 0]]
    assert seen["to default"][:2] == [["record", side], ["wait", 0, side]]
    assert {tuple(entry) for entry in seen["to side"][2:]} == {("launch", side)}
    assert {tuple(entry) for entry in seen["to default"][2:]} == {("launch", 0)}


def test_results_are_read_after_the_call_on_another_stream(on_stub):
    seen = on_stub["reading_on_another_stream"]
    reader = seen["reader"]
    waits = [["record", 0], ["wait", reader, 0]]
    copies = [["copy", reader]] * 2
    assert seen["read"] == waits + copies
    assert seen["prefetch"] == [*waits, *copies, ["record", reader]]


def test_totals_are_awaited_on_the_device_that_copies_them(on_stub):
    """Streams 0 and 1 are the devices' default streams."""
    *sums, copy, record = on_stub["counting_on_another_device"]["count"]
    assert (copy, record) == (["copy", 1], ["record", 1])
    assert sums
    assert {stream for _, stream in sums} == {1}


def test_a_capture_takes_launches_along_and_nothing_else(on_stub):
    """No copy, no page-locked memory, and no stream from outside."""
    seen = on_stub["captures"]
    side, fork = seen["streams"]
    launches = [["launch", side]] * 3
    assert seen["call"] == launches
    assert seen["step"] == launches
    assert seen["replay"] == [["replay", 0]]
    assert seen["fork"] == [*launches, ["record", side], ["wait", fork, side], *[["launch", fork]] * 3]


def test_the_mode_in_which_synchronising_raises_ends_with_its_block(on_stub):
    """PyTorch warns about the mode once it has set it, and warnings are errors here."""
    assert on_stub["synchronising"] == {"inside": 2, "after": 0}
