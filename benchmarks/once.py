"""A few merges of one network, all pass, cold cache, nothing else: to profile with ``python -m benchmarks.once``."""

from __future__ import annotations

import sys

import torch

import inmerge_fast
from benchmarks.helps import TIMED, parser_with
from benchmarks.timing import cold_cache, synchronize
from benchmarks.work import NETS, REGIMES, SEED, net_of


def main(arguments: list[str] | None = None) -> int:
    """Merge."""
    parser = parser_with(__doc__, TIMED, "python -m benchmarks.once --help", "nsys profile python -m benchmarks.once")
    parser.add_argument("--net", choices=NETS, default="VGG19")
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    _model, plan = net_of(options.net, "float32", options.device)
    for step in range(options.calls):
        cold_cache(options.device)()
        inmerge_fast.merge_(plan, threshold=REGIMES["all pass"], seed=SEED, step=step)
    synchronize(options.device)
    print(f"{options.calls} merges of {options.net}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
