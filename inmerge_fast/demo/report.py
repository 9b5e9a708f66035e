"""What the demo prints once its arms are trained."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import nn

from .data import ImageSet
from .train import History, MergeSetting, Similarities

TEXT_WIDTH = 110
# Mean similarity. A threshold of 0.06 brought it to 0.58-0.89 in 4 to 12 epochs, 0.08 and more left it below 0.05.
COLLAPSED = 0.5


@dataclass(frozen=True)
class Arm:
    """One way to continue the training."""

    key: str
    title: str
    setting: MergeSetting | None


@dataclass(frozen=True)
class Outcome:
    """An arm after its training, with the similarities in the trained net.

    Attributes:
        corrupted: by corruption, how many labels of each test image are judged right, int64 ``(test images,)``.
    """

    arm: Arm
    net: nn.Module
    history: History
    similarities: Similarities
    corrupted: dict[str, torch.Tensor] = field(default_factory=dict)


def report(outcomes: list[Outcome], data: ImageSet, next_steps: Sequence[tuple[str, str]] = ()) -> None:
    """Print the tables, the summary, and what to do next; the first outcome is that without merging."""
    _print_epochs(outcomes, data)
    _print_notices(outcomes)
    _print_layers(outcomes)
    _print_totals(outcomes, data)
    _print_summary(outcomes, data)
    if next_steps:
        print("\nWhat to do next:")
        for what, how in next_steps:
            print(f"  {what}:\n      {how}")


def _print_epochs(outcomes: list[Outcome], data: ImageSet) -> None:
    print(f"\nTraining loss, test {data.measure} in % and merged filters of every epoch:\n")
    head, names = "       ", "  epoch"
    column = "labels" if data.multi_label else "test"
    for outcome in outcomes:
        title = f"{outcome.arm.key}  {outcome.arm.title}"
        columns = f"    loss  {column:>6}" + ("  merged" if outcome.arm.setting else "")
        names += "  " + columns
        head += f"    {title:{len(columns) - 2}}"
    print(head.rstrip())
    print(names)
    for epoch in range(len(outcomes[0].history.loss)):
        row = f"  {epoch + 1:5d}"
        for outcome in outcomes:
            history = outcome.history
            loss, accuracy = history.loss[epoch], history.accuracy[epoch]
            finite = math.isfinite(loss) and math.isfinite(accuracy)
            row += f"    {loss:6.4f}  {100 * accuracy:6.2f}" if finite else f"    {'diverged':>14}"
            row += f"  {history.merged[epoch]:6d}" if outcome.arm.setting else ""
        print(row)


def _print_notices(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        history = outcome.history
        for notice in history.notices:
            print(f"\n{type(notice).__name__}, raised by merge_ in arm {outcome.arm.key}:")
            print(textwrap.fill(str(notice), TEXT_WIDTH, initial_indent="  ", subsequent_indent="  "))
        sampled = sum(layer.sampled for layer in history.layers.values())
        if sampled and not sum(history.merged) and not history.notices:
            print(f"\nArm {outcome.arm.key} merged nothing; merge_ warns after more calls than its {history.calls}.")


def _print_layers(outcomes: list[Outcome]) -> None:
    merging = [outcome for outcome in outcomes if outcome.arm.setting]
    print("\nPairs sampled, filters merged and the largest similarity sampled, by layer:\n")
    print(f"  {'layer':8}  filters" + "".join(f"   {o.arm.key}: sampled  merged  max sim." for o in merging))
    filters = {name: count.filters for outcome in merging for name, count in outcome.history.layers.items()}
    for name in sorted(filters):
        row = f"  {name:8}  {filters[name]:7d}"
        for outcome in merging:
            count = outcome.history.layers.get(name)
            if count is None:
                row += f"   {'left out':>10}  {'':>6}  {'':>8}"
                continue
            largest = f"{count.max_similarity:8.4f}" if count.sampled else f"{'-':>8}"
            row += f"   {count.sampled:10d}  {count.merged:6d}  {largest}"
        print(row.rstrip())


def _print_totals(outcomes: list[Outcome], data: ImageSet) -> None:
    rest = sorted(time for outcome in outcomes for time in outcome.history.rest_ms)
    typical, quarters = median(rest), (rest[len(rest) // 4], rest[3 * len(rest) // 4])
    column, kinds = "labels %" if data.multi_label else "test %", list(outcomes[0].corrupted)
    print(f"\nTotals, with {data.measure} on test {data.noun} as they are, {' and '.join(kinds) or 'unchanged'}:\n")
    head = f"  arm                        merged  mean sim.  max sim.  {column:>8}"
    print(head + "".join(f"  {f'{kind} %':>9}" for kind in kinds) + "  merging   share")
    for outcome in outcomes:
        history, arm = outcome.history, outcome.arm
        top = max(map(max, outcome.similarities.largest.values()))
        row = f"  {arm.key}  {arm.title:22}  {sum(history.merged):6d}  {outcome.similarities.mean:9.4f}  {top:8.4f}"
        row += "  diverged" if history.diverged else f"  {100 * history.accuracy[-1]:8.2f}"
        for right in outcome.corrupted.values():
            finite = bool((right >= 0).all())
            row += f"  {100 * right.float().mean().item() / data.labels_each:9.2f}" if finite else f"  {'diverged':>9}"
        share = 100 * history.merge_ms / (history.merge_ms + typical)
        print(row + (f"  {history.merge_ms:4.2f} ms  {share:4.1f} %" if arm.setting else f"  {'-':>7}  {'-':>6}"))
    text = (
        "mean and max sim.: similarities in the trained net, measured as above. merging: median time that merging "
        f"takes at a step. share: its share of a step that takes {typical:.1f} ms without it, the median of all arms. "
        f"Half of those steps took {quarters[0]:.1f} to {quarters[1]:.1f} ms"
    )
    if quarters[1] - quarters[0] > max(o.history.merge_ms for o in outcomes if o.arm.setting):
        text += (
            ": what else this machine does makes them differ by more than merging takes, so that the time of whole "
            "steps says nothing about an arm"
        )
    print()
    print_paragraph(f"{text}.", "  ")


def _print_summary(outcomes: list[Outcome], data: ImageSet) -> None:
    print("\nWhat this shows, and what not:")
    base = outcomes[0]
    for outcome in outcomes[1:]:
        print_paragraph(f"- {_verdict(base, outcome, data)}", "  ")
    print_paragraph(
        "- One run with one seed proves nothing about accuracy, for or against merging: another seed or data order "
        "moves it too, and of several comparisons some look like more than noise. Merging is not expected to raise "
        "accuracy on small sets like this one. The demo shows what merging does, what it costs, and how to see whether "
        "it acts; what it did over many seeds is in the README.",
        "  ",
    )


def _verdict(base: Outcome, other: Outcome, data: ImageSet) -> str:
    assert other.arm.setting is not None
    name, merged = f"Arm {other.arm.key} ({other.arm.title})", sum(other.history.merged)
    if not merged:
        top = max(layer.max_similarity for layer in other.history.layers.values())
        reason = f"the largest similarity it sampled, {top:.4f}, is not above {other.arm.setting.threshold:.4g}"
        text = f"{name} merged nothing: {reason if top > -math.inf else 'it sampled no pair'}. "
        if _same_weights(base.net, other.net):
            return f"{text}Its weights are those of arm {base.arm.key}, bit for bit."
    else:
        text = f"{name} merged {merged:,} filter{'s' if merged > 1 else ''}"
        text += ". " if other.arm.setting.lasting else ", each for the passes of one step. "
    gone = [outcome.arm.key for outcome in (base, other) if outcome.history.diverged]
    if gone:
        return f"{text}The training of arm {' and of arm '.join(gone)} has diverged, so that nothing is compared."
    text += _comparison(base, other, data)
    if other.corrupted:
        before, after = (sum(one.corrupted.values(), torch.zeros_like(base.history.right)) for one in (base, other))
        noun, each = f"{' and '.join(other.corrupted)} {data.noun}", len(other.corrupted) * data.labels_each
        text += f" {_compared(base.arm.key, before, after, noun, data.measure, each)}"
    if other.similarities.mean > COLLAPSED:
        text += (
            f" The mean similarity of its filters is {other.similarities.mean:.2f}: they have collapsed onto each "
            "other, its threshold is too low."
        )
    return text


def _comparison(base: Outcome, other: Outcome, data: ImageSet) -> str:
    before, after = base.history.right, other.history.right
    return _compared(base.arm.key, before, after, f"test {data.noun}", data.measure, data.labels_each)


def _compared(key: str, base: torch.Tensor, other: torch.Tensor, noun: str, measure: str, each: int) -> str:
    """A comparison image by image, of which ``each`` judgements are made."""
    # Judgements of one image are not independent, so the test counts images: those with more and with fewer right.
    difference, short = other - base, noun.split()[-1]
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    if gained == lost == 0:
        same = f"as many labels of each of the {noun}" if each > 1 else f"the same {noun}"
        return f"It judges {same} right as arm {key}."
    total, p = int(difference.sum()), sign_test(gained, lost)
    won, fewer = ("with more right", "with fewer") if each > 1 else ("won", "lost")
    text = (
        f"{measure.capitalize()} on {noun} against arm {key}: {100 * total / (len(difference) * each):+.2f} percentage "
        f"points ({gained} of {len(difference)} {short} {won}, {lost} {fewer}; sign test p = {p:.2g}). "
    )
    if p >= 0.05:
        return f"{text}That is within the noise of the {noun}: no difference is shown."
    text += f"That is more than the noise of the {noun}"
    if (gained - lost) * total <= 0:  # a few with many labels won or lost outweigh the rest
        return f"{text}, but their number and the {measure} do not agree: neither harm nor gain is shown."
    return text + (": merging did harm here." if gained < lost else ", but no evidence of a gain (see below).")


def sign_test(gained: int, lost: int) -> float:
    """Two-sided p of at least this imbalance between wins and losses if both were equally likely (exact McNemar)."""
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in one.state_dict().items())


def print_paragraph(text: str, indent: str = "") -> None:
    """Print a wrapped paragraph; one that starts with a dash is a list item."""
    hanging = indent + "  " if text.startswith("- ") else indent
    print(textwrap.fill(text, TEXT_WIDTH, initial_indent=indent, subsequent_indent=hanging))
