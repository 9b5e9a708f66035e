"""What the demo prints once its arms are trained."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

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
    """An arm after its training, with the similarities in the trained net."""

    arm: Arm
    net: nn.Module
    history: History
    similarities: Similarities


def report(outcomes: list[Outcome], data: ImageSet) -> None:
    """Print the tables and the summary; the first outcome is that without merging."""
    _print_epochs(outcomes, data)
    _print_notices(outcomes)
    _print_layers(outcomes)
    _print_totals(outcomes, data)
    _print_summary(outcomes, data)


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
    for name, first in merging[0].history.layers.items():
        row = f"  {name:8}  {first.filters:7d}"
        for outcome in merging:
            count = outcome.history.layers[name]
            largest = f"{count.max_similarity:8.4f}" if count.sampled else f"{'-':>8}"
            row += f"   {count.sampled:10d}  {count.merged:6d}  {largest}"
        print(row)


def _print_totals(outcomes: list[Outcome], data: ImageSet) -> None:
    column = "labels %" if data.multi_label else "test %"
    print(
        "\nTotals; similarities are those in the trained net, measured by dry runs as above; times are medians over\n"
        "the training steps:\n"
    )
    print(f"  arm                      sampled  merged  mean sim.  max sim.  {column:>8}   merge_     step   share")
    for outcome in outcomes:
        history, arm = outcome.history, outcome.arm
        sampled = sum(layer.sampled for layer in history.layers.values())
        top = max(map(max, outcome.similarities.largest.values()))
        row = f"  {arm.key}  {arm.title:20}  {sampled:7d}  {sum(history.merged):6d}  {outcome.similarities.mean:9.4f}"
        row += f"  {top:8.4f}  " + ("diverged" if history.diverged else f"  {100 * history.accuracy[-1]:6.2f}")
        times = f"{history.merge_ms:4.2f} ms" if arm.setting else "-"
        share = f"{100 * history.merge_ms / history.step_ms:.1f} %" if arm.setting else "-"
        print(f"{row}  {times:>7} {history.step_ms:5.1f} ms  {share:>6}")


def _print_summary(outcomes: list[Outcome], data: ImageSet) -> None:
    print("\nWhat this shows, and what not:")
    base = outcomes[0]
    for outcome in outcomes[1:]:
        print_paragraph(f"- {_verdict(base, outcome, data)}", "  ")
    print_paragraph(
        "- One run with one seed proves nothing about accuracy, for or against merging: another seed or data order "
        "moves it too. Merging is not expected to raise accuracy on small sets like this one. The demo shows what "
        "merge_ does, what it costs, and how to see whether it acts.",
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
        text = f"{name} merged {merged} filter{'s' if merged > 1 else ''}. "
    gone = [outcome.arm.key for outcome in (base, other) if outcome.history.diverged]
    if gone:
        return f"{text}The training of arm {' and of arm '.join(gone)} has diverged, so that nothing is compared."
    text += _comparison(base, other, data)
    if other.similarities.mean > COLLAPSED:
        text += (
            f" The mean similarity of its filters is {other.similarities.mean:.2f}: they have collapsed onto each "
            "other, its threshold is too low."
        )
    return text


def _comparison(base: Outcome, other: Outcome, data: ImageSet) -> str:
    # Labels of one image are not independent, so the test counts images: those with more and with fewer labels right.
    difference = other.history.right - base.history.right
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    if gained == lost == 0:
        same = f"as many labels of each of the test {data.noun}" if data.multi_label else f"the same test {data.noun}"
        return f"It judges {same} right as arm {base.arm.key}."
    total, p = int(difference.sum()), sign_test(gained, lost)
    won, fewer = ("with more labels right", "with fewer") if data.multi_label else ("won", "lost")
    text = (
        f"Test {data.measure} against arm {base.arm.key}: {100 * total / (len(difference) * data.labels_each):+.2f} "
        f"percentage points ({gained} of {len(difference)} {data.noun} {won}, {lost} {fewer}; sign test p = {p:.2g}). "
    )
    if p >= 0.05:
        return f"{text}That is within the noise of the test {data.noun}: no difference is shown."
    text += f"That is more than the noise of the test {data.noun}"
    if (gained - lost) * total <= 0:  # a few with many labels won or lost outweigh the rest
        return f"{text}, but their number and the {data.measure} do not agree: neither harm nor gain is shown."
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
