"""Time of forward-only merging of whole networks, beside ``merge_``: ``python -m benchmarks.bench_forward``.

All convolutions, half of their filters, alpha = 0.5 and no threshold, the defaults: every sampled filter is blended,
kept and put back. Merging and restoring are timed with nothing in cache each, and added up. Each provider is first
checked against the reference with recorded draws, and that it restores every bit; one that is wrong or fails is
recorded with its error, and the rest are timed.

In passes, each with a file of its own under ``benchmarks/results/<device>/``: *eager* (``forward.json``, with
``merged`` itself) and *compile* (``forward-compile.json``). Both time ``merge_`` with the same arguments in the same
rounds. What forward-only merging adds to a training step: ``python -m benchmarks.bench_training --forward-only``.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import compiled, forward_only, providers
from benchmarks.bench_merge import Pass, about_net, run_passes, time_plan
from benchmarks.check import Checker
from benchmarks.command import parser_of
from benchmarks.result_files import ResultFile
from benchmarks.work import DTYPES, NETS, Settings, net_of
from inmerge_fast.forward_only import ALPHA, PROB, SKIP_FIRST, THRESHOLD

SETTINGS = Settings(THRESHOLD, PROB, ALPHA, restores=True)
PASSES = {
    "eager": Pass(
        list(NETS), ["float32", "bfloat16"], lambda _: [forward_only.EAGER, forward_only.SAMPLED, forward_only.MERGED]
    ),
    "compile": Pass(["VGG19", "ResNet-18", "ResNet-50"], ["float32"], forward_only.forms_for),
}


def time_net(pass_: str, name: str, dtype: str, options: argparse.Namespace, file: ResultFile) -> None:
    """All rows of one network in one dtype."""
    _model, plan = net_of(name, dtype, options.device, SKIP_FIRST)  # the plan keeps no network alive
    checker, sound = Checker(plan, PROB), []
    for provider in PASSES[pass_].candidates(plan):
        with file.attempt(net=name, dtype=dtype, provider=provider.name, form=provider.form):
            checker.check_restored(provider)
            sound.append(provider)
    about = about_net(name, dtype, plan)
    with file.attempt(net=name, dtype=dtype):
        chosen = [compiled.fastest(sound, plan, SETTINGS)] if pass_ == "compile" and sound else sound
        time_plan(plan, chosen, SETTINGS, about, options, file, beside=providers.MERGE, kernels=True)


def main(arguments: list[str] | None = None) -> int:
    """Time all networks, pass by pass, and write the result files."""
    parser = parser_of(__doc__)
    parser.add_argument("--passes", nargs="+", choices=PASSES, metavar="PASS", help="in this order (default: all)")
    parser.add_argument("--nets", nargs="+", choices=NETS, metavar="NET", help="default: what each pass is for")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help="likewise")
    options = parser.parse_args(arguments)
    if options.quick:  # compiling is never quick
        options.nets, options.dtypes, options.repeats, options.seconds = ["ConvNeXt-T"], ["float32"], 5, 0.3
        options.passes = options.passes or ["eager"]
    settings = {"prob": PROB, "alpha": ALPHA, "threshold": THRESHOLD}
    return run_passes("forward", PASSES, options.passes or PASSES, options, settings, time_net)


if __name__ == "__main__":
    sys.exit(main())
