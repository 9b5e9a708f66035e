"""Measures and statistics of the paper's experiments, against independent implementations."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.paper import robustness
from benchmarks.paper.compare import compare, holm, paired, two_level_bootstrap
from benchmarks.paper.metrics import FilterState, accuracy, auc, calibration_error, class_aucs, filter_state
from benchmarks.paper.report import _sentence
from benchmarks.paper.storage import append, load_result
from benchmarks.paper.tables import _absolute, _differences, _numbers
from inmerge_fast import MergePlan

metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


def predictions(classes, multi_label=False, count=200):
    rng = np.random.default_rng(classes)
    scores = rng.random((count, classes)).round(2)  # with ties
    if multi_label:
        return rng.integers(0, 2, (count, classes)), scores
    return rng.integers(0, classes, count), scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_auc_of_classes_is_sklearns(classes):
    labels, scores = predictions(classes)
    each = [metrics.roc_auc_score(labels == k, scores[:, k]) for k in range(classes)]
    assert class_aucs(labels, scores) == pytest.approx(each, abs=1e-12)
    assert auc(labels, scores) == pytest.approx(each[1] if classes == 2 else np.mean(each), abs=1e-12)
    assert accuracy(labels, scores) == pytest.approx(metrics.accuracy_score(labels, scores.argmax(1)), abs=0.02)


def test_auc_of_labels_is_sklearns():
    labels, scores = predictions(14, multi_label=True)
    assert auc(labels, scores) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert accuracy(labels, scores) == pytest.approx(((scores > 0.5) == labels).mean())


def test_a_label_without_both_values_has_no_auc():
    labels, scores = predictions(3, multi_label=True)
    labels[:, 1] = 0
    values = class_aucs(labels, scores)
    assert math.isnan(values[1])
    assert auc(labels, scores) == pytest.approx(np.mean([values[0], values[2]]))


@pytest.mark.parametrize("task", ["binary-class", "multi-class", "multi-label, binary-class"])
def test_measures_are_medmnists(task):
    evaluator = pytest.importorskip("medmnist.evaluator", reason="needs the medmnist package and pandas")
    labels, scores = predictions(2 if task == "binary-class" else 5, multi_label=task.startswith("multi-label"))
    theirs = labels if labels.ndim == 2 else labels[:, None]
    given = scores[:, 1:] if task == "binary-class" else scores
    assert auc(labels, scores) == pytest.approx(evaluator.getAUC(theirs, given, task), abs=1e-12)
    assert accuracy(labels, scores) == pytest.approx(evaluator.getACC(theirs, given, task), abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize(("classes", "multi_label"), [(2, False), (5, False), (14, True)])
def test_no_measure_makes_a_number_of_scores_that_are_not_finite(bad, everywhere, classes, multi_label):
    labels, scores = predictions(classes, multi_label)
    scores[slice(None) if everywhere else (3, 1)] = bad
    assert all(map(math.isnan, class_aucs(labels, scores)))
    for measure in (auc, accuracy, calibration_error):
        assert math.isnan(measure(labels, scores)), measure.__name__


def result(seed, arm="baseline", acc=0.5, loss=(0.1,), **merging):
    """A result as far as tables look at it."""
    return {
        "recipe": {"name": "r", "corruptions": "own"}, "data": {}, "seed": seed, "corruptions": "own",
        "arm": {"label": arm, "stop": False, "reseed": False, "merging": merging or None},
        "digests": {"backbone": "b", "weights": f"{arm}{seed}"}, "loss": list(loss),
        "filters": {"rank_before": 1.0, "rank": None if acc is None else 0.5, "collapsed": False},
        "merging": {"per_step": 1.0} if merging else None,
        "metrics": {key: {"acc": acc, "auc": acc} for key in ("clean", "corrupted", "noise")}
        | {"attacked": {"fgsm 8/255": acc, "pgd 2/255": acc}},
    }  # fmt: skip


@pytest.mark.parametrize("gone", [{"acc": None}, {"loss": [0.1, None]}, {"acc": 0.05, "loss": [None]}])
def test_a_diverged_run_is_called_that_and_enters_no_comparison(gone):
    base = [result(seed) for seed in range(4)]
    arm = [result(seed, "tau", 0.6 + 0.01 * seed, alpha=0.8) for seed in range(3)] + [
        result(3, "tau", **{"acc": 0.9, **gone}, alpha=0.8)
    ]
    rows = compare([base, arm])
    assert (rows[1].n, rows[1].diverged, rows[1].rank) == (3, 1, (1.0, 0.5))
    assert rows[1].title == "tau (diverged: 1 of 4 seeds)"
    assert rows[1].trained.mean["acc"] == pytest.approx(61)
    assert (rows[1].trained.difference["acc"].n, rows[1].trained.difference["acc"].mean) == (3, pytest.approx(11))
    assert "| tau (diverged: 1 of 4 seeds) |" in _absolute(rows)
    assert "| tau (diverged: 1 of 4 seeds) |" in _differences(rows)
    lines = [line[:4] for row in rows for line in _numbers(row)]
    assert ["tau (diverged: 1 of 4 seeds)", "as trained only", "acc", 3] in lines
    assert "Not compared: tau (diverged: 1 of 4 seeds)." in _sentence(rows)
    # Nor a sound run whose baseline diverged.
    rows = compare([[result(0), result(1), result(2, **{"acc": 0.9, **gone})], arm[:3]])
    assert (rows[0].diverged, rows[1].diverged, rows[1].n) == (1, 0, 3)
    assert (rows[1].trained.difference["acc"].n, rows[1].trained.difference["acc"].mean) == (2, pytest.approx(10.5))


def test_an_arm_that_diverged_altogether_has_no_numbers():
    rows = compare([[result(0), result(1)], [result(seed, "tau", None, alpha=0.8) for seed in (0, 1)]])
    assert rows[1].title == "tau (diverged: 2 of 2 seeds)"
    for table in (_absolute(rows[1:]), _differences(rows)):
        assert "nan" not in table
        assert "| tau (diverged: 2 of 2 seeds) |" in table
    assert math.isnan(rows[1].trained.difference["acc"].mean)
    assert "Bit-identical" not in _sentence(rows)


def controlled(seed, trained, recomputed, arm="baseline", norms=1, **merging):
    """A result that was evaluated in both ways; None for a network without batch norm."""
    found = result(seed, arm, trained, **merging)
    again = None if recomputed is None else result(seed, acc=recomputed)["metrics"]
    found["metrics"]["clean"]["ece"] = 0.1
    if again is not None:
        again["clean"]["ece"] = 0.2
    return found | {"recomputed": again, "batch_norms": norms}


def test_both_evaluations_stand_in_the_tables_and_the_recomputed_one_counts():
    """The artefact: 20 points as trained, of which recomputed statistics leave nothing."""
    base = [controlled(seed, 0.5, 0.6) for seed in range(4)]
    arm = [controlled(seed, 0.7 + 0.001 * seed, 0.6 - 0.001 * seed, "tau", alpha=0.8) for seed in range(4)]
    rows = compare([base, arm])
    assert rows[1].trained.difference["acc"].mean == pytest.approx(20.15)
    assert rows[1].trained.difference["acc"].p_holm < 0.05
    assert rows[1].judged("acc").mean == rows[1].recomputed.difference["acc"].mean == pytest.approx(-0.15)
    assert "4 comparisons" not in _sentence(rows)
    assert "no gains" in _sentence(rows)
    for table in (_absolute(rows), _differences(rows)):
        assert "| tau | as trained |" in table
        assert "| tau | recomputed |" in table
    assert "| baseline | recomputed | 4 |" in _absolute(rows)
    assert [" 10.00 ± 0.00 |" in line for line in _absolute(rows).splitlines()[2:]] == [True, False, True, False]
    assert {line[1] for line in _numbers(rows[1])} == {"as trained", "recomputed"}


def test_what_was_not_measured_again_and_networks_without_batch_norm_are_marked():
    old = compare([[result(seed) for seed in range(4)], [result(seed, "tau", 0.6, alpha=0.8) for seed in range(4)]])
    assert "| tau | as trained only |" in _differences(old)
    assert old[1].recomputed.n == 0
    assert old[1].judged("acc") is old[1].trained.difference["acc"]
    assert "| – | – |" in _absolute(old)  # no calibration error
    # Of a row of which some seeds were measured again, those alone stand beside it, and they do not count for all.
    mixed = compare([
        [controlled(0, 0.5, 0.5), controlled(1, 0.5, 0.5), result(2)],
        [controlled(0, 0.6, 0.5, "tau", alpha=0.8), result(1, "tau", 0.6, alpha=0.8), result(2, "tau", 0.6, alpha=0.8)],
    ])  # fmt: skip
    assert (mixed[0].recomputed.n, mixed[1].recomputed.n, mixed[1].recomputed.difference["acc"].n) == (2, 1, 1)
    assert mixed[1].judged("acc").mean == pytest.approx(10)
    assert "| baseline | recomputed | 2 |" in _absolute(mixed)
    without = compare([[controlled(seed, 0.5, None, norms=0) for seed in range(3)],
                       [controlled(seed, 0.6, None, "tau", 0, alpha=0.8) for seed in range(3)]])  # fmt: skip
    assert "| tau | no batch norm |" in _differences(without)
    assert without[1].judged("acc").mean == pytest.approx(10)
    sequence = [result(seed) for seed in range(3)]
    for one in sequence:
        one["recipe"]["model"] = "mamba_small"
    assert "| baseline | no batch norm |" in _absolute(compare([sequence]))


def test_the_calibration_error_is_that_of_its_definition():
    labels, scores = predictions(4)
    confidence, right = scores.max(1), scores.argmax(1) == labels
    total = 0.0
    for index in range(15):  # (m/15, (m+1)/15], as in Guo et al. (2017)
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(labels, scores) == pytest.approx(total, abs=1e-12)
    certain = np.eye(3)[[0, 1, 2, 0]]
    assert calibration_error(np.array([0, 1, 2, 0]), certain) == 0
    assert calibration_error(np.array([1, 2, 0, 1]), certain) == 1


def test_paired_differences_are_students():
    a, b = np.random.default_rng(0).normal(size=(2, 9))
    one, expected = paired(b - a), stats.ttest_rel(b, a)
    interval = expected.confidence_interval(0.95)
    assert (one.p, one.low, one.high) == pytest.approx((expected.pvalue, interval.low, interval.high))
    assert one.n == 9


def test_paired_differences_of_identical_arms_and_of_one_seed():
    same = paired([0.0] * 5)
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    # Too few for an interval, and differences that agree by chance, as steps of one image do.
    for few in ([0.5], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5, 0.5]):
        one = paired(few)
        assert one.mean == 0.5
        assert math.isnan(one.low)
        assert math.isnan(one.p)
    # One image of 500 each time, which is the same number but for rounding.
    one = paired([100 * count / 500 - 100 * (count - 1) / 500 for count in (499, 438, 97, 4)])
    assert 0 < one.sd < 1e-12
    assert math.isnan(one.p)


def test_results_from_before_there_was_a_choice_of_corruptions_compare_with_new_ones(tmp_path):
    result = {
        "recipe": {"name": "r"}, "data": {}, "seed": 0, "arm": {"label": "a", "stop": 0, "reseed": 0, "merging": None},
        "digests": {"backbone": "b", "weights": "w"}, "filters": {"rank_before": 1.0, "rank": 1.0, "collapsed": False},
        "merging": None, "metrics": {"attacked": {"fgsm 8/255": 0, "pgd 2/255": 0}}
        | {key: {"acc": 0.5, "auc": 0.5} for key in ("clean", "corrupted", "noise")},
    }  # fmt: skip
    append(tmp_path, "r/a/test-000", result)
    old = load_result(tmp_path, "r/a/test-000")
    new = result | {"recipe": {"name": "r", "corruptions": "own", "attack": True}, "corruptions": "own"}
    assert compare([[old], [new]])[1].identical == 1
    theirs = result | {"recipe": {"name": "r", "corruptions": "medmnistc"}, "corruptions": "medmnistc 0.1.0"}
    with pytest.raises(ValueError, match="another recipe than the baseline's"):
        compare([[old], [theirs]])
    first, second = (theirs | {"corruptions": f"medmnistc {version}"} for version in ("0.1.0", "0.2.0"))
    with pytest.raises(ValueError, match="another source of corruptions"):
        compare([[first], [second]])


def test_holm_is_the_textbook_step_down():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    found = holm([0.02, math.nan, 0.9])
    assert found[0] == pytest.approx(0.04)
    assert math.isnan(found[1])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.01, math.nan, 0.02], of=5) == pytest.approx([0.05, math.nan, 0.08], nan_ok=True)


def test_settings_that_were_not_measured_again_count_in_the_correction():
    """One of three settings was: its p is multiplied by three, or a gain would come from looking at one alone."""
    base = [controlled(seed, 0.5, 0.5) for seed in range(4)]
    again = [controlled(seed, 0.6 + 0.01 * seed, 0.6 + 0.01 * seed, "again", alpha=0.8) for seed in range(4)]
    others = [[result(seed, name, 0.55 + 0.01 * seed, alpha=0.8) for seed in range(4)] for name in ("b", "c")]
    one = compare([base, again, *others])[1].recomputed.difference["acc"]
    assert one.p_holm == pytest.approx(3 * one.p)


def test_two_level_bootstrap_covers_images_and_seeds():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 150)

    def scores(shift):
        value = 0.5 + 0.2 * shift * (2 * labels - 1) + rng.normal(scale=0.3, size=150)
        return np.stack([1 - value, value], axis=1)

    same = [([one], [one]) for one in (scores(1) for _ in range(4))]
    assert two_level_bootstrap(labels, same, auc, repeats=50) == (0, 0, 0)
    better = [([scores(0.5)], [scores(2)]) for _ in range(4)]
    mean, low, high = two_level_bootstrap(labels, better, auc, repeats=100)
    assert 0 < low < mean < high < 0.5
    one_seed = two_level_bootstrap(labels, better[:1], auc, repeats=100)
    assert one_seed[2] - one_seed[1] > 0.02  # the images alone make it uncertain


def test_collapse_is_an_alarm_and_rank_is_as_defined():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
    plan = MergePlan(net, skip_first=0)
    before = filter_state(plan)
    unit = nn.functional.normalize(net[1].weight.detach().flatten(1), dim=1)
    values = np.linalg.svd(unit.double().numpy(), compute_uv=False)
    shares = values / values.sum()
    assert before.rank["1"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()) / 16)
    assert not filter_state(plan).collapsed(before)
    with torch.no_grad():
        net[1].weight.copy_(net[1].weight[:1] + 1e-3 * net[1].weight)
    after = filter_state(plan)
    assert after.rank["1"] < 0.2
    assert after.similarity["1"] > 0.99
    assert after.collapsed(before)
    assert not before.collapsed(after)
    crowded = FilterState({"1": 0.9}, {"1": 0.97})  # 128 filters of 4 elements look like this from the start
    assert not FilterState({"1": 0.9}, {"1": 0.98}).collapsed(crowded)


@pytest.mark.parametrize("name", robustness.CORRUPTIONS)
@pytest.mark.parametrize("shape", [(4, 1, 28, 28), (4, 3, 28, 28), (2, 1, 16, 16, 16)], ids=["grey", "rgb", "volume"])
def test_corruptions_grow_with_severity_and_repeat(name, shape):
    if name == "jpeg":
        pytest.importorskip("PIL")
    smooth = torch.rand(shape[0], shape[1], *[4] * (len(shape) - 2), generator=torch.Generator().manual_seed(0))
    mode = "trilinear" if len(shape) == 5 else "bilinear"
    images = (255 * nn.functional.interpolate(smooth, size=shape[2:], mode=mode)).byte()
    copies = [robustness.corrupt(images, name, severity) for severity in robustness.SEVERITIES]
    assert all(one.shape == images.shape and one.dtype == torch.uint8 for one in copies)
    if name == "motion_blur":  # even lengths shift by half a pixel, too: what grows is how smooth the rows are
        changes = [-one.float().diff(dim=-1).abs().mean().item() for one in (images, *copies)]
    else:
        changes = [(one.float() - images.float()).square().mean().item() for one in (images, *copies)]
    if name == "pixelate":  # a grid that does not divide the side adds an error of its own
        changes = [changes[0], changes[1], changes[-1]]
    assert changes[0] < changes[1]
    assert changes == sorted(changes)
    assert torch.equal(copies[2], robustness.corrupt(images, name, 3))


def test_attacks_raise_the_loss_and_stay_near():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 3

    def loss_of(images):
        return nn.functional.cross_entropy(net(images), y)

    fgsm = robustness.attack(loss_of, x, 0.1, 1)
    pgd = robustness.attack(loss_of, x, 0.1, 10)
    clean, once, many = (loss_of(images).item() for images in (x, fgsm, pgd))
    assert clean < once <= many
    for images in (fgsm, pgd):
        assert (images - x).abs().max() <= 0.1 + 1e-6
        assert 0 <= images.min() <= images.max() <= 1
