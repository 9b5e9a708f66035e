"""The main command: what it prints, that a seed fixes it, and what it says about options it cannot use."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from inmerge_fast import MergeStats, merge_
from inmerge_fast.__main__ import main
from inmerge_fast.demo import train as demo_train
from inmerge_fast.demo.data import ImageSet
from inmerge_fast.demo.report import Arm, Outcome, _comparison, report, sign_test
from inmerge_fast.demo.train import (
    History,
    MergeSetting,
    Schedule,
    Similarities,
    build_net,
    evaluate,
    measure_similarities,
    train,
)

BRIEF = ["--quick", "--epochs", "1", "--backbone-epochs", "1", "--device", "cpu"]
TIMES = re.compile(r" *[\d.]+ (ms|%)|^  mean and max sim.*?\n\n", re.MULTILINE | re.DOTALL)


def table(text, title):
    """Rows of numbers below a line that starts with ``title``, as lists of words."""
    lines = text[text.index(f"\n{title}") :].splitlines()[1:]
    rows = []
    for line in lines[1:]:
        words = line.split()
        if rows and not words:
            break
        if any(re.fullmatch(r"-?\d+\.\d+", word) for word in words):
            rows.append(words)
    return rows


@pytest.fixture(scope="module")
def quick():
    """Output of ``python -m inmerge_fast --quick`` in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "inmerge_fast", "--quick"],
        cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_quick_says_what_it_runs_on(quick):
    head = quick.stdout[: quick.stdout.index("Backbone")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert "scikit-learn digits: 1000 training and 797 test images, 10 classes" in head
    for part in ("VGG-like", f"device    {device}", f"torch {torch.__version__}", "merges 3 layers"):
        assert part in head


def test_quick_keeps_the_log_short(quick):
    assert all(f"{name}: 100%" in quick.stderr for name in ("backbone", "arm a", "arm b", "arm c", "arm d"))
    assert len(re.split(r"[\r\n]+", quick.stderr)) < 50


def test_quick_shows_that_the_papers_setting_does_nothing(quick):
    text = " ".join(quick.stdout.split())
    notice = (
        r"NoEffectWarning, raised by merge_ in arm b: 100 calls of merge_ sampled [\d,]+ filter pairs and merged none"
    )
    assert re.search(notice, text)
    assert "raised by merge_ in arm c" not in text
    assert "Its weights are those of arm a, bit for bit." in text


def test_quick_merges_at_the_threshold_it_read_off(quick):
    epochs = [[float(word) for word in row] for row in table(quick.stdout, "Training loss")]
    assert [int(row[0]) for row in epochs] == [1, 2, 3, 4, 5]
    baseline, paper, own = ([row[a:b] for row in epochs] for a, b in ((1, 3), (3, 5), (6, 8)))
    assert baseline == paper  # trained on the same data in the same order
    assert own != baseline
    assert min(row[1] for row in baseline + own) > 95  # learnt, and not collapsed
    assert [row[5] for row in epochs] == [0] * 5
    merged = [int(row[8]) for row in epochs]
    assert sum(count > 0 for count in merged) >= 4

    layers = table(quick.stdout, "Pairs sampled")
    assert [row[0] for row in layers] == [f"conv{number}" for number in range(1, 9)]
    assert all(row[2:6] == ["left", "out", "left", "out"] for row in layers[:5])
    layers = layers[5:]
    assert sum(int(row[6]) for row in layers) == sum(merged)
    assert [row[2] for row in layers] == [row[5] for row in layers]  # the same draws in both arms
    totals = re.findall(r"^  [abc]  \D+ (\d+) ", quick.stdout[quick.stdout.index("\nTotals") :], re.MULTILINE)
    assert totals == ["0", "0", str(sum(merged))]

    similarities = table(quick.stdout, "Similarities in the backbone")
    lowest, middle, highest = map(float, similarities[-1][-3:])
    assert lowest < middle < highest < 0.3
    threshold = float(re.search(r"Threshold of arm c: ([\d.]+)", quick.stdout).group(1))
    assert threshold == pytest.approx(middle, abs=1e-4)


def test_quick_times_merging(quick):
    shares = re.findall(r"([\d.]+) ms +([\d.]+) %", quick.stdout)
    rest = float(
        re.search(r"share of a step that takes ([\d.]+) ms without it", " ".join(quick.stdout.split())).group(1)
    )
    assert len(shares) == 3
    for merge, share in shares:
        assert 0 < float(merge) < rest
        assert float(share) == pytest.approx(100 * float(merge) / (float(merge) + rest), abs=0.1)


def test_quick_shows_forward_only_merging_on_corrupted_images(quick):
    rows = re.findall(r"^  [abcd]  \D+ \d.*", quick.stdout[quick.stdout.index("\nTotals") :], re.MULTILINE)
    noisy = [float(row.split()[-6 if row.endswith("%") else -4]) for row in rows]
    assert len(noisy) == 4
    assert noisy[0] == noisy[1] < 80  # the corruption is one, and an arm of the same weights sees the same images
    assert noisy[3] > noisy[0] + 10  # 25 points with this seed
    layers = table(quick.stdout, "Pairs sampled")
    assert all(row[-3] == row[-2] != "0" for row in layers)  # every sampled filter of every layer
    text = " ".join(quick.stdout.split())
    assert re.search(r"Arm d \(forward-only merging\) merged [\d,]+ filters, each for the passes of one step\. ", text)
    assert re.search(r"Accuracy on noisy and blurred images against arm a: [+-]", text)


def test_quick_says_what_its_words_mean_and_what_is_next(quick):
    text = " ".join(quick.stdout.split())
    assert "Four arms, which is what trainings that are compared are called, " in text
    assert text.index("which write nothing") < text.index("dry_run")
    assert text.index("What to do next: ") > text.index("One run with one seed proves nothing")
    assert "python -m inmerge_fast inspect CHECKPOINT" in text


def test_same_seed_same_output(capsys):
    outputs = []
    for seed in ("7", "7", "8"):
        main([*BRIEF, "--seed", seed])
        outputs.append(TIMES.sub("", capsys.readouterr().out))
    assert outputs[0] == outputs[1]
    assert table(outputs[0], "Training loss") != table(outputs[2], "Training loss")


def test_threshold_that_is_too_low_is_called_harmful(capsys):
    main([*BRIEF, "--epochs", "2", "--threshold", "-1", "--prob", "0.6", "--alpha", "0.5"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Threshold of arm c: -1, as given by --threshold." in text
    assert "c --threshold: merge_ at every step, for good, with alpha=0.5, prob=0.6, threshold=-1" in text
    assert "merging did harm here" in text
    assert "CollapseWarning, raised by merge_ in arm c: layer conv" in text
    assert "collapsed" in text


def test_no_samples_and_no_warning_yet(capsys):
    main([*BRIEF, "--prob", "0"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Arm b merged nothing; merge_ warns after more calls than its 31." in text
    assert "Arm c (read-off threshold) merged nothing: it sampled no pair." in text


def tiny(channels=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, channels, 16, 16, generator=generator)
    y = torch.arange(40) % 2
    return ImageSet("noise", "", x[:32], y[:32], x[32:], y[32:], 2)


def test_merges_before_every_training_step_and_never_in_evaluation(monkeypatch):
    net, seen = build_net(1, 2, seed=0), []

    def spy(model, *, step, **kwargs) -> MergeStats:
        assert model is net
        assert model.training
        seen.append((step, kwargs))
        return merge_(model, step=step, **kwargs)

    net.register_forward_pre_hook(lambda module, args: seen.append("train" if module.training else "test"))
    monkeypatch.setattr(demo_train, "merge_", spy)
    schedule = Schedule(first_epoch=3, epochs=2, high=0.01, low=0.001, batch_size=10, seed=5)
    history = train(net, tiny(), schedule, MergeSetting(0.8, 0.3, -1.0), "test")
    arguments = {"alpha": 0.8, "prob": 0.3, "threshold": -1.0, "seed": 5}
    expected = []
    for epoch in (3, 4):
        for batch in range(3):
            expected += [(3 * epoch + batch, arguments), "train"]
        expected += ["train", "test"]  # of which the first is for the statistics of batch norm
    assert seen == expected
    assert history.calls == 6
    assert sum(history.merged) == sum(layer.merged for layer in history.layers.values()) > 0


def test_measuring_similarities_changes_nothing():
    net = build_net(1, 2, seed=0)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    similarities = demo_train.measure_similarities(net, seed=0)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert set(similarities.largest) == {"conv6", "conv7", "conv8"}
    assert all(len(values) == demo_train.DRY_RUNS for values in similarities.largest.values())
    assert abs(similarities.mean) < 0.02


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1.0), (1, 1, 1.0), (0, 2, 0.5), (10, 0, 2 / 1024), (5, 1, 0.21875)]
)
def test_sign_test(gained, lost, p):
    assert sign_test(gained, lost) == pytest.approx(p)


def test_several_labels_are_judged_one_by_one():
    logits = torch.tensor([[1.0, -1.0, 2.0], [0.0, 3.0, -0.1], [-4.0, -5.0, 6.0]])
    truth = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    data = ImageSet("labels", "", logits, truth, logits, truth, classes=3)
    assert evaluate(torch.nn.Identity(), data).tolist() == [3, 1, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("multi_label", [False, True])
def test_outputs_that_are_not_finite_judge_nothing(bad, multi_label):
    logits = torch.tensor([[1.0, -1.0], [bad, 3.0], [bad, bad]])
    truth = torch.zeros(3, 2) if multi_label else torch.zeros(3, dtype=torch.int64)
    data = ImageSet("labels", "", logits, truth, logits, truth, classes=2)
    assert evaluate(torch.nn.Identity(), data).tolist() == [1, -1, -1]


def test_a_training_that_diverged_is_called_that(capsys):
    x, y = torch.randn(32, 1, 16, 16), torch.arange(32) % 2
    data = ImageSet("noise", "", x, y, x, y, classes=2)
    setting, schedule = MergeSetting(0.8, 0.3, 0.3), Schedule(0, 2, 1e30, 1e29, 16, 0)
    sound, gone = (build_net(1, 2, 0) for _ in range(2))
    before = train(sound, data, Schedule(0, 2, 1e-3, 1e-4, 16, 0), None, "sound")
    after = train(gone, data, schedule, setting, "gone")
    assert not before.diverged
    assert after.diverged
    assert math.isnan(after.accuracy[-1])
    similarities = measure_similarities(sound, 0)
    report([Outcome(Arm("a", "no merging", None), sound, before, similarities),
            Outcome(Arm("b", "too fast", setting), gone, after, measure_similarities(gone, 0))], data)  # fmt: skip
    text = capsys.readouterr().out
    epochs = text[text.index("Training loss") : text.index("Pairs sampled")]
    assert epochs.count("diverged") == 2
    assert "diverged" in text[text.index("Totals") : text.index("What this shows")]
    assert "training of arm b has diverged, so that nothing is compared" in " ".join(text.split())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ([0] * 9, "It judges as many labels of each of the test images right as arm a."),
        ([-1] * 8 + [0], "-22.22 percentage points (0 of 9 images with more right, 8 with fewer; sign test p = "
         "0.0078). That is more than the noise of the test images: merging did harm here."),
        ([1] * 8 + [0], "That is more than the noise of the test images, but no evidence of a gain (see below)."),
        ([-1] * 4 + [1] * 5, "+2.78 percentage points (5 of 9 images with more right, 4 with fewer; sign test "
         "p = 1). That is within the noise of the test images: no difference is shown."),
        # One image with four labels lost is one image lost, whatever it does to the accuracy.
        ([-4] * 2 + [0] * 7, "-22.22 percentage points (0 of 9 images with more right, 2 with fewer; sign test "
         "p = 0.5). That is within the noise"),
        ([-1] * 17 + [4] * 5, "+3.41 percentage points (5 of 22 images with more right, 17 with fewer; sign test"
         " p = 0.017). That is more than the noise of the test images, but their number and the label accuracy do not "
         "agree: neither harm nor gain is shown."),
    ],
)  # fmt: skip
def test_arms_are_compared_image_by_image(change, expected):
    images, truth = torch.zeros(len(change), 1, 16, 16), torch.zeros(len(change), 4)
    data = ImageSet("labels", "", images, truth, images, truth, classes=4)
    base, other = (
        Outcome(Arm(key, "", None), torch.nn.Identity(), History(right=right), Similarities(0.0, {}))
        for key, right in (("a", torch.full((len(change),), 4)), ("b", 4 + torch.tensor(change)))
    )
    assert expected in _comparison(base, other, data)


def test_goes_on_from_a_saved_network(tmp_path, capsys):
    path = tmp_path / "net.pt"
    main([*BRIEF, "--save", str(path)])
    first = capsys.readouterr().out
    torch.save({"state_dict": {f"module.{key}": value for key, value in torch.load(path).items()}}, path)
    main([*BRIEF, "--resume", str(path)])
    second = capsys.readouterr().out
    found = re.search(r"Backbone: .*net\.pt, entry 'state_dict': 50 tensors loaded; test accuracy ([\d.]+) %", second)
    assert found, second
    assert found[1] in table(first, "Training loss, test")[-1]  # of arm c at its end
    torch.save(build_net(3, 10, 0).state_dict(), path)
    with pytest.raises(
        SystemExit, match=r"--resume: .*another shape: conv1\.weight \(16, 3, 3, 3\) instead of \(16, 1,"
    ):
        main([*BRIEF, "--resume", str(path)])


def save(path, size, labels):
    arrays = {}
    for split, count in (("train", 64), ("val", 4), ("test", 16)):
        arrays[f"{split}_images"] = np.random.default_rng(0).integers(0, 256, (count, *size), dtype=np.uint8)
        arrays[f"{split}_labels"] = labels(np.arange(count)).astype(np.uint8)
    np.savez(path, **arrays)


def classes(index):
    return (index % 3)[:, None]


def fourteen_labels(index):
    return np.add.outer(index, np.arange(14)) % 5 == 0


@pytest.mark.parametrize(
    ("size", "labels", "words"),
    [
        ((28, 28, 3), classes, ("16 test images, 3 classes, 28x28 RGB", "3x3 conv", "test accuracy", "test")),
        ((28, 28), fourteen_labels,
         ("16 test images, 14 labels per image, 28x28 grey", "3x3 conv", "test label accuracy", "labels")),
        ((28, 28, 28), classes,
         ("16 test volumes, 3 classes, 28x28x28 grey, resized to 16x16x16", "3x3x3 conv", "test accuracy", "test")),
        ((16, 16, 16), fourteen_labels,
         ("16 test volumes, 14 labels per volume, 16x16x16 grey", "3x3x3 conv", "test label accuracy", "labels")),
    ],
)  # fmt: skip
def test_trains_on_a_file(tmp_path, capsys, size, labels, words):
    save(tmp_path / "set.npz", size, labels)
    main([*BRIEF, "--data", str(tmp_path / "set.npz"), "--batch-size", "16"])
    out = capsys.readouterr().out
    text = " ".join(out.split())
    data, net, measure, column = words
    assert f"set.npz: 64 training and {data}; " in text
    assert f"VGG-like, {net}" in text
    assert f"Training loss, {measure} in % and" in text
    assert f" epoch loss {column}{3 * f' loss {column} merged'} 1 " in text
    assert f"max sim. {column} % noisy % blurred % merging share" in text
    (row,) = table(out, "Training loss")
    assert row[1:3] == row[3:5]


def test_trains_on_pneumoniamnist(capsys):
    folder = os.environ.get("INMERGE_DATA")
    path = Path(folder or ".") / "pneumoniamnist.npz"
    if not folder or not path.is_file():
        pytest.skip("set INMERGE_DATA to a folder that holds pneumoniamnist.npz")
    main([*BRIEF, "--data", str(path)])
    out = capsys.readouterr().out
    said = " ".join(out.split())
    assert (
        "pneumoniamnist.npz: 900 training and 500 test images, 2 classes, 28x28 grey; 8 of the 524 validation" in said
    )
    assert "; a random 900 of the 4708 training images are used" in said
    (row,) = table(out, "Training loss")
    assert all(float(row[column]) > 60 for column in (2, 4, 7, 10))


# Options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "1.5"], r"argument --threshold: must be a number in \[-1, 1\], got '1.5'"),
        (["--alpha", "nan"], r"argument --alpha: must be a number in \[0, 1\], got 'nan'"),
        (["--prob", "much"], r"argument --prob: must be a number in \[0, 1\], got 'much'"),
        (["--epochs", "0"], "argument --epochs: must be an integer from 1 to 10000, got '0'"),
        (["--backbone-epochs", "1.5"], "argument --backbone-epochs: must be an integer from 1"),
        (["--batch-size", "1"], "argument --batch-size: must be an integer from 2 to 4096, got '1'"),
        (["--seed", "-1"], r"argument --seed: must be an integer in \[0, 2\*\*63\), got '-1'"),
        (["--device", "abacus"], "argument --device: 'abacus' cannot be used here: "),
        (["--device", "meta"], "argument --device: 'meta' cannot be used here: "),
        (["--data", "nowhere.npz"], "error: nowhere.npz: there is no such file"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: python -m inmerge_fast")
    assert re.search(message, error)


@pytest.mark.parametrize(("module", "package"), [("tqdm", "tqdm"), ("sklearn.datasets", "scikit-learn")])
def test_missing_extra(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=rf"^the demo needs {package} .*: pip install 'inmerge_fast\[demo\]'$"):
        main(["--quick"])
