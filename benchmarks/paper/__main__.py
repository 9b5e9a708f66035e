"""``python -m benchmarks.paper EXPERIMENT``: run one of the paper's experiments and show what came out."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import confirm, forward_only, forward_page, medmnist_c, report, resampled, trained
from .config import OWN
from .data import load, md5_of
from .dataset import MissingDataError, Reading
from .experiments import EXPERIMENTS, FINE_TUNE_ARMS, Experiment, Options
from .figures import write_figures
from .grid import Where, execute, is_leader
from .models import Weights
from .tables import manifest_name, markdown, write_manifest, write_tables
from .xrays import folder_of, is_xrays

RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("paper-quick")  # ignored by git: tiny runs say nothing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description="The InMerge paper's experiments: arms, which are trainings that are compared, go on from one\n"
        "trained network with the same images in the same order, for several seeds. Runs that have a result are\n"
        "not repeated, so that a killed command goes on where it was.",
        epilog="needs: pip install -c constraints.txt -e '.[paper]'. Seconds with --quick, else hours on two cores.\n\n"
        "examples:\n"
        "  python -m benchmarks.paper table-medmnist --quick\n"
        "  python -m benchmarks.paper sweep-threshold --data pneumoniamnist.npz --seeds 4\n"
        "  python -m benchmarks.paper report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", choices=[*EXPERIMENTS, forward_only.NAME, *confirm.STAGES, trained.NAME,
                        "report"], help="what to run; report writes tables, figures, RESULTS.md, FORWARD_ONLY.md "
                        "and PAPER_TABLES.md; "
                        f"{trained.NAME} has options of its own, see {trained.NAME} --help")  # fmt: skip
    parser.add_argument("stage", nargs="?", choices=["plan", "confirm", "supplement", resampled.STAGE],
                        help=f"of {forward_only.NAME}: explore on validation images and write the plan, do it, plan a "
                        "control that was thought of later, or make runs again for intervals over test images, "
                        "too")  # fmt: skip
    parser.add_argument("--from-scratch", action="store_true", help=f"{forward_only.NAME}: arms from random weights, "
                        "not from one trained backbone")  # fmt: skip
    parser.add_argument("--like", metavar="NAME", help=f"{forward_only.NAME} plan: take over what another plan has "
                        "chosen, e.g. digits, without exploring")  # fmt: skip
    parser.add_argument("--data", help="digits, a MedMNIST name, an .npz file in its layout, a folder with NIH "
                        "ChestX-ray14, or package.module:function, which gives data sets by 'train', 'val' and 'test'; "
                        "nih:FOLDER, chexpert:FOLDER or chexpert-zeros:FOLDER, which torchxrayvision reads "
                        "(default: digits; of table-chestxray14: chestxray14)")  # fmt: skip
    parser.add_argument(
        "--root", help="folder of the data (default: the environment variable INMERGE_DATA, else ~/.medmnist)"
    )
    parser.add_argument(
        "--size",
        type=_count,
        help="side of the images: 28, 64, 128 or 224 for MedMNIST's names, any for "
        "ChestX-ray14; images of an .npz file or of your own are resized to it",
    )
    parser.add_argument("--bits", type=_bits, metavar="N", help="bits that hold data in ChestX-ray14's images, if they "
                        "are of 16: white is 2**N - 1 (default: what the files say, where that is sure)")  # fmt: skip
    parser.add_argument("--allow-overlap", action="store_true", help="ChestX-ray14: take an image or a patient in two "
                        "parts, or an image twice in one, as it is and only say so")  # fmt: skip
    parser.add_argument("--model", help="vgg8, resnet18_small, vit_small, mamba_small; vgg11, vgg16, vgg19, vgg11_bn, "
                        "vgg16_bn, vgg19_bn, resnet18, resnet34, resnet50, densenet121; efficientnet_lite0 with "
                        "ImageNet weights; timm:NAME; package.module:function, called with classes and "
                        "channels")  # fmt: skip
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="pre-trained weights: a state dict or a checkpoint with one, of "
        "PyTorch or as safetensors; a head of another number of classes is left out, and there may be none: a backbone "
        "alone",
    )
    parser.add_argument("--entry", metavar="NAME", help="which of several networks in the file of --weights, or the "
                        "prefix of its keys (default: the first that fits)")  # fmt: skip
    parser.add_argument("--seeds", type=_count, metavar="N", help="seeds 0 to N - 1 of every arm")
    parser.add_argument("--backbone-epochs", type=_count, metavar="N", help="epochs before the arms, without merging")
    parser.add_argument("--arm-epochs", type=_count, metavar="N", help="epochs of every arm")
    parser.add_argument("--lr", type=_rate, help="learning rate at the start; the rest of the schedule follows in "
                        "proportion")  # fmt: skip
    parser.add_argument("--limit", type=_count, metavar="N", help="use this many images of every part, evenly spaced")
    parser.add_argument("--arms", type=_names, default=(), metavar="NAME,...", help="fine-tune: which of "
                        f"{', '.join(FINE_TUNE_ARMS)} (default: all)")  # fmt: skip
    parser.add_argument("--batch-size", type=_count, metavar="N", help="images per step")
    parser.add_argument(
        "--micro-batches", type=_count, default=1, metavar="N", help="parts of a batch, gradients accumulated"
    )
    parser.add_argument("--corruptions", choices=["auto", OWN, medmnist_c.PACKAGE], default="auto",
                        help="our own ones, or the data set's in the package medmnistc, made for 224 px (default: the "
                        "package's where it can be imported and has some for the data set)")  # fmt: skip
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--each-forward", action="store_true",
                        help="merge before every forward pass, as published, not once per step")  # fmt: skip
    parser.add_argument("--in-validation", action="store_true",
                        help="validate after each epoch and merge in it, as published")  # fmt: skip
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--processes", type=_count, metavar="N",
                        help="processes at a time, one thread each (default: one per core; 1 on a GPU)")  # fmt: skip
    parser.add_argument("--out", type=Path, help=f"folder of result files (default: {RESULTS.name}/ beside this "
                        f"command; with --quick {QUICK_RESULTS}/)")  # fmt: skip
    parser.add_argument("--tensorboard", metavar="FOLDER", help="log there for TensorBoard, too")
    parser.add_argument("--show", action="store_true", help="train nothing, show the runs that are done")
    parser.add_argument("--quick", action="store_true", help="tiny runs that only show that everything works")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _bits(text: str) -> int:
    try:
        return Reading(bits=int(text)).bits or 0
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _md5_of_weights(path: Path) -> str:
    """MD5 of a file; of an index of shards that of all of them, since other weights may have the same index."""
    parts = [path, *sorted(path.parent.glob("*.safetensors"))] if path.suffix == ".json" else [path]
    found = [md5_of(one) for one in parts]
    return found[0] if len(found) == 1 else hashlib.md5(" ".join(found).encode()).hexdigest()


def _corruptions(wanted: str, spec: str, size: int | None, root: str | None, reading: Reading) -> str:
    """Whose corruptions are used with a data set; says so where nobody has chosen."""
    if wanted != "auto":
        return wanted
    try:
        medmnist_c.registry()  # first, since the data may be large or missing
        data = load(spec, size=size, root=root, reading=reading)
        medmnist_c.check(data.test.images, data.name)
        out, text = medmnist_c.PACKAGE, f"those of {medmnist_c.version()} (or --corruptions {OWN})"
    except ValueError as error:
        out, text = OWN, f"our own ({str(error).split(';')[0]})"
    if is_leader():
        print(f"corruptions: {text}")
    return out


def show(experiment: Experiment, out: Path) -> Path:
    """Write the manifest, tables and figures of an experiment and print its tables."""
    path = write_manifest(experiment, out)
    written = [write_tables(path), *write_figures(path)]
    print(f"\n{markdown(path)}\nwritten: {', '.join(str(one) for one in written)}")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: command line without the program's name; ``sys.argv`` if None.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [trained.NAME]:  # it trains nothing, and has a command line of its own
        print(f"written: {trained.main(arguments[1:], RESULTS)}")
        return
    parser = _parser()
    given = parser.parse_args(arguments)
    out = given.out or (QUICK_RESULTS if given.quick else RESULTS)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = given.processes or (cores if given.device == "cpu" else 1)
    data, root = given.data or ("chestxray14" if given.experiment == "table-chestxray14" else "digits"), given.root
    if data.endswith(".npz") and Path(data).exists():  # only its name goes into result files
        data, root = Path(data).name, str(Path(data).resolve().parent)
    elif Path(data).is_dir() and data != "chestxray14":
        data, root = Path(data).resolve().name, str(Path(data).resolve().parent)
    elif is_xrays(data) and folder_of(data).is_dir():
        data, root = f"{data.partition(':')[0]}:{folder_of(data).resolve().name}", str(folder_of(data).resolve().parent)
    device = given.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: each rank has a GPU of its own
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    reading = Reading(given.bits, given.allow_overlap)
    chosen = None if given.weights is None else Weights(given.weights, given.entry)
    where = Where(out, root, device, processes, given.tensorboard, chosen, reading)
    if given.show and given.experiment not in EXPERIMENTS:
        parser.error(f"argument --show: is for experiments, not for {given.experiment}")
    if (given.experiment == forward_only.NAME) != (given.stage is not None):
        parser.error(
            f"argument stage: plan, confirm, supplement or images, for {forward_only.NAME} and for nothing else"
        )
    if given.experiment != forward_only.NAME and (given.from_scratch or given.like):
        parser.error(f"arguments --from-scratch and --like: are for {forward_only.NAME}")
    if given.like and given.stage != "plan":
        parser.error("argument --like: is for plan")
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"argument --device: {device}: there is no CUDA device here")
    if given.each_forward and given.micro_batches == 1:
        parser.error("argument --each-forward: changes nothing with one forward pass per step; give --micro-batches")
    if given.arms and given.experiment != "fine-tune":
        parser.error("argument --arms: is for fine-tune")
    if given.weights is not None and not given.weights.is_file():
        parser.error(f"argument --weights: {given.weights}: there is no such file")
    if given.entry is not None and given.weights is None:
        parser.error("argument --entry: is for --weights")
    weights = f"{given.weights.name}, md5 {_md5_of_weights(given.weights)}" if given.weights is not None else None
    weights = f"{weights}, entry {given.entry}" if given.entry is not None else weights
    options = Options(
        data=data, size=given.size, model=given.model, weights=weights, seeds=given.seeds,
        backbone_epochs=given.backbone_epochs, arm_epochs=given.arm_epochs, batch_size=given.batch_size, lr=given.lr,
        limit=given.limit, arms=given.arms,
        bf16=given.bf16, each_forward=given.each_forward, in_validation=given.in_validation,
        micro_batches=given.micro_batches, quick=given.quick,
        corruptions=OWN if given.experiment == "report"
        else _corruptions(given.corruptions, data, given.size, root, reading),
    )  # fmt: skip
    try:
        if given.experiment == "report":
            report.write(out)
            if out == RESULTS:
                readme = RESULTS.parent / "README.md"
                readme.write_text(forward_page.updated(readme.read_text(), forward_page.readme_section(out)))
        elif given.stage == resampled.STAGE:
            recipe = forward_only.recipe_of(options, given.from_scratch)
            resampled.resample(forward_only.plan_path(recipe, out), where)
        elif given.experiment == forward_only.NAME:
            forward_only.run_stage(given.stage, options, where, given.from_scratch, given.like)
        elif given.experiment in confirm.STAGES:
            confirm.STAGES[given.experiment](options, where)
        else:
            experiment = EXPERIMENTS[given.experiment](options)
            try:
                if not given.show:
                    execute(experiment.runs(), where)
            except MissingDataError as error:
                if given.experiment != "table-chestxray14" or options.data != "chestxray14":
                    raise
                print(f"no data, so our row stays empty: {error}")
            if is_leader():
                print(f"results of {manifest_name(experiment)} in {out}")
                show(experiment, out)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
