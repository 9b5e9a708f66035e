"""``python -m inmerge_fast``, or ``inmerge-fast``: the demo; with ``inspect``: a look at a saved model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import torch

from . import __version__
from .demo.demo import PAPER, Options, load_data, run
from .inspection.command import main as inspect_model

COMMAND = "inmerge-fast"


def _within(kind: Callable[[str], float], low: float, high: float, what: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:  # NaN fails too
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return parse


def _device(text: str) -> str:
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from error
    return text


def _program() -> str:
    """How this was called: by the name of the installed command, or as a module."""
    return COMMAND if os.path.basename(sys.argv[0]).removesuffix(".exe") == COMMAND else "python -m inmerge_fast"


def _parser() -> argparse.ArgumentParser:
    share = _within(float, 0.0, 1.0, "a number in [0, 1]")
    count = _within(int, 1, 10_000, "an integer from 1 to 10000")
    parser = argparse.ArgumentParser(
        prog=_program(),
        description="""\
Train a small CNN on real images without in-model merging and with it, and show what merging does and what it costs.
Four arms, which is what trainings that are compared are called, go on from one trained network:
  a  no merging
  b  merging that stays in the weights, with the paper's setting
  c  the same, with a threshold read off the network's own similarities (or --threshold)
  d  forward-only merging, undone before each update""",
        epilog=f"""\
needs: pip install 'inmerge_fast[demo]'. Half a minute with --quick, about two without; a GPU is not needed.

examples:
  {_program()} --quick                      # scikit-learn's digits, no download
  {_program()} --data FILE.npz              # images of your own
  {_program()} inspect CHECKPOINT           # look at the filters of a saved model instead; has its own --help""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"inmerge_fast {__version__}, torch {torch.__version__}")
    parser.add_argument("--data", metavar="FILE.npz", help="a file in MedMNIST format: images or volumes, with one or "
                        "several labels each (default: scikit-learn's digits)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer epochs and images")
    parser.add_argument("--epochs", type=count, metavar="N", help="epochs of each arm")
    parser.add_argument("--backbone-epochs", type=count, metavar="N", help="epochs before the arms, without merging")
    parser.add_argument("--batch-size", type=_within(int, 2, 4096, "an integer from 2 to 4096"), default=32,
                        metavar="N", help="images per step (default: %(default)s)")  # fmt: skip
    parser.add_argument("--threshold", type=_within(float, -1.0, 1.0, "a number in [-1, 1]"), metavar="T",
                        help="threshold of arm c, instead of the one read off")  # fmt: skip
    parser.add_argument("--alpha", type=share, default=PAPER.alpha, metavar="A",
                        help="share of itself that a merged filter keeps in arm c (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--prob",
        type=share,
        default=PAPER.prob,
        metavar="P",
        help="probability in arm c that a filter looks at a partner (default: %(default)s)",
    )
    parser.add_argument("--seed", type=_within(int, 0, 2**63 - 1, "an integer in [0, 2**63)"), default=0, metavar="N",
                        help="seed of weights, data order and merging (default: %(default)s)")  # fmt: skip
    parser.add_argument("--save", metavar="FILE", help="save the state dict of arm c's network when it is trained")
    parser.add_argument("--resume", metavar="FILE", help="go on from the network in FILE, as --save writes it, instead "
                        "of training a backbone")  # fmt: skip
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu",
                        help="torch device (default: %(default)s)")  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo, or ``inspect``.

    Args:
        arguments: command line without the program's name; ``sys.argv`` if None.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "inspect":
        inspect_model(arguments[1:], f"{_program()} inspect")
        return
    parser = _parser()
    options = Options(**vars(parser.parse_args(arguments)))
    try:
        data = load_data(options)
    except ValueError as error:
        parser.error(str(error))
    # The net is too small for more: two threads took 8 ms a step where one took 12, but 70 ms while another job ran.
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    run(options, data)


if __name__ == "__main__":
    main()
