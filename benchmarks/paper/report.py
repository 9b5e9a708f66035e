"""Pages from the result files alone.

``RESULTS.md`` has the answer; the folder of results has every experiment's tables and figure, and a sentence on each in
its ``README.md``; ``FORWARD_ONLY.md`` has forward-only merging.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from inmerge_fast.demo.data import require

from . import confirm, controls_page, front, plan_page, trained, trained_page
from .compare import FEWEST, Row
from .experiments import EXPERIMENTS
from .figures import write_figures
from .forward_page import write as write_forward_page
from .tables import SHOWN, csv_of, difference_text, gains_and_losses, rows_of, write_tables

MOST_NAMED = 4  # gains or losses that a sentence names; more are counted
ORDER = [*EXPERIMENTS, "search", "confirm"]
HEAD = """# Does in-model merging help?

A page with the answer, written by `python -m benchmarks.paper report` from the files in
[{folder}/]({folder}/README.md), where a sentence, the tables and a figure of every experiment stand.
[FORWARD_ONLY.md](FORWARD_ONLY.md) has forward-only merging and its controls. How runs are made:
[protocol.py](protocol.py). All arms of a seed start from the same weights, see the same images in the same order for
the same number of epochs, and keep the weights of their last epoch.

*Lasting* merging stays in the weights, as published; *forward-only* merging is undone before each update. A merged
filter keeps the share *alpha* of itself and takes the rest of a *partner*, another filter of its layer, at random
unless said otherwise; it looks at one with probability *p*, and merges if their cosine similarity is above a
threshold: *tau 0.3* is a fixed one, *z 2* is 2/sqrt(D) for filters of D weights, *RankBudget* finds its own and is
what the library recommends for lasting merging. *similar*: a partner among those above the threshold, *nearest*: the
most alike; *skip 10*: without the first ten convolutions. *Linear*: rows of Linear layers merge, too. Filters
*collapse* where a layer lost half of its effective rank or they became alike. *ECE* is the expected calibration error,
less is better; *PGD* an attack by projected gradients; *acc* accuracy. *vgg8* is the VGG-like net below,
*resnet18_small* the ResNet-18 of a quarter of the width; *strong-decay* stands for ten times the weight decay and
twice the learning rate. An *arm* is one of the trainings that are compared, a *seed* one start of all of them; *Holm's
correction* keeps many comparisons from finding something by chance. Other words: [Words](../../docs/index.md#words).

## The answer

"""
INDEX = """# Every experiment in a sentence

Written by `python -m benchmarks.paper report` from the `.jsonl` files here, a run in each line. What belongs together
is said by the `.json` files; all numbers of all tables are in [tables.csv](tables.csv). Tables of test images choose
nothing; the one setting that was followed up from such a table is named as that.

"""
LIMITS = """## Limits

- **Data.** scikit-learn's digits (8x8 pixels; 1000/297/500 images) and PneumoniaMNIST at 28x28. Its file was
  put together from public copies of the images: its counts are the official ones per split, its order is not, so its
  MD5 differs from MedMNIST's; 8 images occur in both the training and the validation part. Not run: PathMNIST,
  DermaMNIST, BloodMNIST, ChestX-ray14, any images of more than 28 px. Forward-only merging saw 1,000 of the 4,708
  training images.
- **Networks.** *vgg8*: a VGG-like net of eight convolutions (0.29 M parameters, batch norm); where a table says so,
  *resnet18_small*, a ResNet-18 of a quarter of the width (0.7 M), an EfficientNet-Lite0 with ImageNet weights
  (fine-tuned for 2 and 2 epochs on 200 images, enlarged to 64 px), a small vision transformer or a small Mamba. Not run
  here: the paper's ImageNet-pretrained VGG19 at 224 px, ResNets of full width and DenseNets. What is said here says
  nothing about them. In the transformer and the Mamba, rows of the classifier may merge, too; in none of the runs did
  one.
- **The control.** Runs of lasting merging were first made before batch-norm statistics were recomputed, and their
  networks were not kept. All of those with batch norm were made again and measured both ways: they ended with the
  weights that they had before, bit for bit, but six (digits, the nearest partner, seeds 0 to 2), whose first form is
  older than a change of its search. The sequence models have no batch norm, and were not made again for the calibration
  error.
- **Seeds.** As the tables say: 20 in confirmations, else 2 to 8, so that intervals are wide and only large effects
  show. What any number of seeds shows is what merges and what collapses. The sweeps are looks around, on
  the test images and without a plan: a gain in one of them is where to look next, not a finding. The one that was
  followed up was chosen by hand from such a table (its plan says so): its fresh seeds are fresh, its test images
  are not.
- **Schedules** are short: backbones of 2 to 16 epochs and arms of 2 to 6 (16 from scratch); the paper's are 30 and 10.
- **Machine.** A CPU, one thread per run; float32, or bfloat16 autocast where a page says so.
- **Corruptions** are of MedMNIST-C's kinds with our own parameters ([robustness.py](robustness.py)), made for any size.
  Where a table says medmnistc they are MedMNIST-C's own ([medmnist_c.py](medmnist_c.py)), made for 224 px: at 28 px
  blur and pixelation are harsher than they were meant to be. Its relative metric, against AlexNet at 224 px, is not
  used.
- **Statistics.** Student's intervals over few seeds; seeds share the test images, so that intervals over seeds say
  nothing about other images (the bootstrap of the Mamba's confirmation does). Holm's correction is within a table and
  metric, not across tables. The recipes with MedMNIST-C's corruptions
  measure the same networks again and are not counted above; nor are FGSM attacks, where collapsed networks gain
  (tables.csv).
"""


def write(out: Path) -> Path:
    """Write all tables, figures and ``RESULTS.md`` beside the folder of results again.

    Raises:
        ValueError: there are no results.
    """
    manifests = find_manifests(out)
    if not manifests:
        raise ValueError(f"{out}: holds no manifest of an experiment; run one first")
    for path in require("tqdm", "tqdm").tqdm(manifests, unit=" experiments", disable=None, leave=False):
        write_tables(path)
        write_figures(path)
    trained_page.write(out)
    (out / "tables.csv").write_text(csv_of(manifests))
    lines = [f"- [{path.stem}]({path.stem}.md): {line}" for path in manifests for line in summary(path)]
    networks = trained.read(out)
    lines += [f"- [{trained.NAME}]({trained.NAME}.md): {trained_page.answer(networks, '.')}"] if networks else []
    plans = [_unconfirmed(path) for path in sorted(out.glob("plan.*.json"))]
    lines += [f"- {line}" for line in plans if line]
    here = {path.name.split(".")[0] for path in manifests} | ({"confirm"} if plans else set())
    lines += [f"- **{name}**: not run." for name in ORDER if name not in here]
    (out / "README.md").write_text(INDEX + "\n".join(lines) + "\n")
    target = out.parent / "RESULTS.md"
    settings = front.settings_of(manifests)
    page = [HEAD.format(folder=out.name) + front.answer(settings, manifests, out)]
    if front.write_figure(settings, out):
        shown = "Small networks: difference in corrupted AUC over merges; trained networks: rank before and after"
        page.append(f"![{shown}]({out.name}/{front.FIGURE})\n")
    page += [controls_page.section(manifests, out), LIMITS]
    target.write_text("\n".join(page).rstrip() + "\n")
    print(f"written: {target}")
    write_forward_page(out)
    plan_page.write(out)
    return target


def find_manifests(out: Path) -> list[Path]:
    """Manifests of experiments, in the order of the command's help."""
    found = [
        path for path in out.glob("*.json") if path.name.split(".")[0] in ORDER and not path.stem.endswith(".result")
    ]
    return sorted(found, key=lambda path: (ORDER.index(path.name.split(".")[0]), path.name))


def summary(path: Path) -> list[str]:
    """A sentence on every recipe of an experiment."""
    name = path.name.split(".")[0]
    if name == "confirm":
        return [_confirmation(path)]
    title = f"**{name}** (validation images)" if name == "search" else f"**{name}**"
    lines = [f"{title}, {recipe}: {_sentence(rows)}" for recipe, rows in rows_of(path) if rows]
    return lines or [f"**{name}**: not run, there are no data here."]


def _seeds_of(rows: Sequence[Row]) -> str:
    counts = sorted({row.n for row in rows})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}" + ("" if number == 1 else "es" if word.endswith("s") else "s")


def _sentence(rows: Sequence[Row]) -> str:
    settings = [row for row in rows if row.kind == "setting"]
    compared = len(settings) * len(SHOWN)
    gains, losses = gains_and_losses(settings)
    text = f"{len(settings)} setting{'s' * (len(settings) > 1)}, {_seeds_of(settings)} seeds; "
    if max(row.n for row in settings) < FEWEST:
        text += "too few to compare"
    else:
        counts = f"{_count(len(gains), 'gain')} and {_count(len(losses), 'loss')}"
        text += f"{compared} comparisons with the baseline: {counts} after Holm's correction"
    few = [
        f"{name}: {'; '.join(one)}"
        for name, one in (("gains", gains), ("losses", losses))
        if 0 < len(one) <= MOST_NAMED
    ]
    text += f" ({'; '.join(few)})" if few else ""
    text += "."
    idle = [row.label for row in settings if 0 < row.n == row.identical]
    if idle:
        text += f" Bit-identical to the baseline in every seed: {'; '.join(idle)}."
    collapsed = [f"{row.label} ({row.collapsed}/{row.n})" for row in settings if row.collapsed]
    if collapsed:
        text += f" Collapsed: {'; '.join(collapsed)}."
    diverged = [row.title for row in rows if row.diverged]
    if diverged:
        text += f" Not compared: {'; '.join(diverged)}."
    floor = next((row for row in rows if row.kind == "reseeded"), None)
    if floor is not None:
        text += f" Another data order alone moves acc by {difference_text(floor.judged('acc'))} points."
    return text


def _unconfirmed(plan: Path) -> str:
    """A sentence on a plan that confirms nothing; empty if it does confirm something, which has a manifest then."""
    content = json.loads(plan.read_text())
    if content["confirm"]:
        return ""
    found = {label: one for label, one in content["search"].items() if one["d_mean"] is not None}
    if not found:
        return f"**confirm**, {content['recipe']['name']}: nothing to confirm, every setting of the search diverged."
    label, best = max(found.items(), key=lambda item: item[1]["d_mean"])
    return (
        f"**confirm**, {content['recipe']['name']}: nothing to confirm, so no look at the test images followed. The "
        f"plan's rule: {content['rule']}. None of the {len(content['search'])} settings of the search is; the best is "
        f"{label} with {best['d_mean']:+.2f} points."
    )


def _confirmation(path: Path) -> str:
    result = path.with_name(f"{path.stem}.result.json")
    if not result.exists():
        return "**confirm**: planned, not run."
    lines = [confirm.said(label, one) for label, one in json.loads(result.read_text()).items()]
    recipe = path.stem.split(".", 1)[1]
    chosen = json.loads((path.parent / f"plan.{recipe}.json").read_text())["rule"]
    text = f"**confirm**, {recipe}: fresh seeds on the test images. The plan's rule: {chosen}. {'; '.join(lines)}."
    return text + "".join(f" In the same runs: {_sentence(rows)}" for _, rows in rows_of(path) if rows)
