"""The plan for the paper's own tables: commands that parse, and costs that are counted from what they run."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks import result_files
from benchmarks.paper import __main__, plan_page, robustness
from benchmarks.paper.experiments import EXPERIMENTS


@pytest.mark.parametrize("plan", plan_page.PLANS, ids=lambda plan: plan.data)
def test_every_command_is_one_and_does_what_is_counted(plan, tmp_path, monkeypatch):
    """The runs that the command makes, counted; nothing is trained."""
    asked = []
    monkeypatch.setattr(__main__, "execute", lambda runs, where: asked.extend(runs))
    monkeypatch.setattr(__main__, "show", lambda experiment, out: None)
    weights = tmp_path / plan_page.WEIGHTS
    torch.save({}, weights)
    (tmp_path / "nih").mkdir()
    command = plan.command.replace("FOLDER", str(tmp_path / "nih")).replace(plan_page.WEIGHTS, str(weights))
    __main__.main([*shlex.split(command)[3:], "--out", str(tmp_path / "out"), "--device", "cpu"])
    one = [run for run in asked if run.seed == 0]
    backbones = {run.recipe: run.recipe.backbone_epochs for run in one}
    steps = {run.recipe: plan.images[0] // run.recipe.batch_size * run.recipe.batch_size for run in one}
    trained = sum(steps[recipe] * epochs for recipe, epochs in backbones.items())
    trained += sum(steps[run.recipe] * run.recipe.arm_epochs for run in one if not run.arm.stop)
    assert plan_page.work(plan)[0] == trained
    assert {run.recipe.backbone_epochs for run in one} == {30}
    assert {run.recipe.arm_epochs for run in one} == {10}
    assert all(run.recipe.bf16 and run.recipe.size in (224, None) and run.recipe.model == "vgg19" for run in one)
    assert len({run.seed for run in asked}) == plan.seeds
    assert len(asked) == plan.seeds * sum(len(arms) for _, arms in EXPERIMENTS[plan.experiment](
        plan_page.Options(data=plan.data, model="vgg19")).groups)  # fmt: skip


def test_work_is_counted():
    forward, both = plan_page.gigaflops("vgg19", 1000)
    assert forward == pytest.approx(2 * 19.63, rel=0.01)  # 19.6 G multiplications and additions, as published for it
    assert both == pytest.approx(3 * forward, rel=0.01)


def test_seeds_are_enough_for_the_gain():
    assert plan_page.seeds_needed(1.0, 0.0, 0.0) == 3
    # 2.8 standard errors, the standard error that of a mean of differences.
    assert plan_page.seeds_needed(1.0, 0.6, 0.8) == 8 + 2
    assert plan_page.seeds_needed(0.5, 0.6, 0.8) == 32 + 2


def column_of(text, title, plan):
    head, row = (next(line for line in text.splitlines() if line.startswith(start)).split(" | ")
                 for start in ("| table | runs", f"| {plan} | "))  # fmt: skip
    return dict(zip(head, (one.removesuffix(" |") for one in row), strict=True))[title]


def test_hours_come_from_a_measured_rate(tmp_path):
    out = tmp_path / "results"
    out.mkdir()
    assert "on a GPU, the data path has not been measured yet" in plan_page.write(out).read_text()
    row = dict.fromkeys(plan_page.KINDS, 2000.0) | {"batch": 64, "peak_gib": 12.5}
    found = {"training": {"vgg19": row}, "reading": {"on the device": 9e4, "read ahead": 3e4},
             "environment": {"device": "Some GPU"}}  # fmt: skip
    (out / "rate.Some-GPU.json").write_text(json.dumps(found))
    text = plan_page.write(out).read_text()
    plan = plan_page.PLANS[1]
    trained, measured = plan_page.work(plan)
    forward, both = plan_page.gigaflops("vgg19", 9)
    hours = plan.seeds * (trained + measured * forward / both) / 2000 / 3600
    assert column_of(text, "hours, Some GPU", "DermaMNIST") == f"{hours:.1f}"
    assert "12.5 GiB at most on Some GPU" in text
    assert "| Some GPU | vgg19, batch 64 | 2,000 |" in text
    assert "Minutes on an" not in text


def test_what_the_host_can_do_stands_beside_what_the_network_takes(tmp_path):
    out = tmp_path / "results"
    out.mkdir()
    kinds = dict.fromkeys(robustness.CORRUPTIONS, 100.0)
    host = {
        "training": {}, "reading": {"on the device": 9e4, "read ahead": 3e4, "read ahead, disk": 4321.0}, "side": 224,
        "corrupting": {**kinds, "noise": 50.0}, "copied": 64, "images": 8192,
        "environment": {"device": "cpu", "processor": "Some CPU", "threads": 2, "load": 0.1},
    }  # fmt: skip
    (out / "rate.Some-CPU.json").write_text(json.dumps(host))
    text = plan_page.write(out).read_text()
    assert "| Some CPU | 2 | 0.1 | 8,192 | 30,000 | 4,321 |" in text
    plan = next(one for one in plan_page.PLANS if one.channels == 1)
    seconds = plan.images[2] * (2 * len(kinds) / 100 + len(robustness.NOISE_SIGMAS) / 50) / 3  # one channel of three
    assert f"{plan.title} {seconds / 60:.0f}." in text
    assert "load before 0.1; measured with 64 images of random pixels" in text


def test_without_a_loop_hours_come_from_a_measured_training_step(tmp_path, monkeypatch):
    row = {"net": "VGG19", "merging": "lasting", "batch": [32, 3, 224, 224], "step_us": 16_000.0, "peak_bytes": 2**31}
    measured = [
        result_files.Results(Path("a/training.json"), "training", {"device": name, "cuda": "13.0"}, rows)
        for name, rows in (("Some GPU", [row]), ("Other GPU", [{**row, "net": "ResNet-50"}]))
    ]
    monkeypatch.setattr(result_files, "load", lambda: measured)
    [speed] = plan_page.speeds([])
    assert (speed.title, speed.rate) == ("hours, Some GPU", 2000.0)
    assert "2,000 images/s, from a training step of 32 images" in speed.source
    assert "2.0 GiB at most; `a/training.json`" in speed.source
    loop = {"environment": {"device": "Some GPU"}, "training": {plan_page.MODEL: {"on the device": 1500.0}}}
    assert [one.rate for one in plan_page.speeds([loop])] == [1500.0], "the whole loop is what a user waits for"
