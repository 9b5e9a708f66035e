"""Runs calls over PyTorch's own streams, events and graphs and a CUDA runtime in host memory; prints JSON.

A script of its own: it needs a CUDA build of PyTorch, with the runtime's stand-in preloaded.
"""

import ctypes
import json
import warnings

import on_gpu
import torch

import inmerge_fast
from inmerge_fast import InMerge, MergePlan, merge_
from inmerge_fast.effect import NO_EFFECT_CALLS

STUB = ctypes.CDLL("libcuda.so.1")
KEPT = []  # weights, which plans do not keep alive
LOG = ctypes.c_char.in_dll(STUB, "stub_log")


def log():
    """What happened since the last look: a word and its streams each, ``("wait", 2, 0)`` for 2 waits for 0."""
    lines = ctypes.string_at(ctypes.addressof(LOG)).decode().splitlines()
    STUB.stub_forget()
    return [[word, *map(int, streams)] for word, *streams in map(str.split, lines)]


def warm_plan(device="cuda:0"):
    """A plan that has compiled its kernels and counted no call that was allowed to write."""
    KEPT.append([torch.randn(64, size).to(device) for size in (27, 144)])
    plan = MergePlan(KEPT[-1])
    assert plan.path == "triton"
    merge_(plan, seed=1, step=0, prob=1.0, dry_run=True)
    log()
    return plan


def number_of(stream):
    return STUB.stub_stream(ctypes.c_void_p(stream.cuda_stream))


def calls_on_two_streams(report):
    plan, side = warm_plan(), torch.cuda.Stream()
    report["side"] = number_of(side)
    for name, stream in (("to side", side), ("to default", torch.cuda.default_stream())):
        with torch.cuda.stream(stream):
            merge_(plan, seed=1, step=1, dry_run=True)
            report[name] = log()


def reading_on_another_stream(report):
    plan, side = warm_plan(), torch.cuda.Stream()
    stats = [merge_(plan, seed=1, step=step, dry_run=True) for step in range(2)]
    log()
    with torch.cuda.stream(side):
        _ = stats[0].layers
        report["read"] = log()
    merge_(plan, seed=1, step=2, dry_run=True)
    log()
    with torch.cuda.stream(side):
        stats[1].prefetch()
        report["prefetch"] = [entry for entry in log() if entry[0] != "host_alloc"]
    report["reader"] = number_of(side)


def counting_on_another_device(report):
    plan = warm_plan("cuda:1")
    with torch.cuda.device(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(NO_EFFECT_CALLS):
            merge_(plan, seed=1, step=step)
    report["count"] = [entry for entry in log() if entry[0] not in ("launch", "host_alloc")]


def captures(report):
    """A call of each kind in a capture, the first that may write; and a fork inside one."""
    plan, side = warm_plan(), torch.cuda.Stream()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side):
        log()
        merge_(plan, seed=1, step=1)
        report["call"] = log()
    fork, plan = torch.cuda.Stream(), warm_plan()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side):
        fork.wait_stream(side)
        log()
        merge_(plan, seed=1, step=1)
        with torch.cuda.stream(fork):
            merge_(plan, seed=1, step=2)
        report["fork"] = log()
        side.wait_stream(fork)
    report["streams"] = [number_of(side), number_of(fork)]
    merger = InMerge([torch.nn.Linear(8, 8, device="cuda")], seed=3, guard=None)  # it multiplies, which needs a GPU
    merger.prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        log()
        merger.step()
        report["step"] = log()
    merger.prepare()
    log()
    graph.replay()
    report["replay"] = log()


def synchronising(report):
    warnings.simplefilter("error")  # as in the suite
    with on_gpu.synchronising_raises():
        report["inside"] = torch.cuda.get_sync_debug_mode()
    report["after"] = torch.cuda.get_sync_debug_mode()


def main():
    scenarios = [calls_on_two_streams, reading_on_another_stream, counting_on_another_device, captures, synchronising]
    reports = {scenario.__name__: {} for scenario in scenarios}
    for scenario in scenarios:
        scenario(reports[scenario.__name__])
    print(json.dumps(reports | {"version": inmerge_fast.__version__}))


if __name__ == "__main__":
    main()
