"""Every Python block of README.md and docs/ runs as pasted: the first of a page alone, each other after the first."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import types
import warnings

import pytest
import torch
from pages import BLOCK, PAGES, ROOT, name_of, snippet, snippets, text_of

import inmerge_fast
from benchmarks import nets
from inmerge_fast.__main__ import main
from inmerge_fast.lease import lease_of
from inmerge_fast.paths.match import PARTNER_RULES

HELD_TO_ITS_OUTPUT = "README.md"
RECIPES = "docs/frameworks.md"  # which test_recipes.py runs, in both forms of merging
ALL = [each for page in PAGES for each in snippets(name_of(page))]
PROCESSES = "init_process_group"  # a block that several processes run, as it says
GPU = "torch.cuda.CUDAGraph"  # a block that says that it needs one
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
TORCHVISION = {
    "resnet18": lambda num_classes=1000: nets.resnet18(num_classes),
    "resnet50": lambda num_classes=1000: nets.resnet50(num_classes),
    "vgg19": lambda num_classes=1000: nets.vgg19(num_classes, hidden=8),
}


def needs_more(each):
    return each.page in (HELD_TO_ITS_OUTPUT, RECIPES) or PROCESSES in each.code or GPU in each.code


def third_party(code):
    """Top-level names of the packages that a block imports."""
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        yield from (name.partition(".")[0] for name in names)


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    """Where files may be written."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages, and ours where few steps merge nothing
        yield


def execute(code, name, names):
    """Run code, with networks of torchvision's names and sizes where it imports those and they are not installed."""
    with pytest.MonkeyPatch.context() as patch:
        if "torchvision" in third_party(code) and not HAS_TORCHVISION:
            package = types.ModuleType("torchvision")
            package.models = types.ModuleType("torchvision.models")
            vars(package.models).update(TORCHVISION)
            patch.setitem(sys.modules, "torchvision", package)
            patch.setitem(sys.modules, "torchvision.models", package.models)
        exec(compile(code, name, "exec"), names)


def run(each):
    """The names after a block has run, and what it printed."""
    for package in {*third_party(each.first), *third_party(each.code)} - {"torchvision"}:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    execute(each.first, f"{each.page}, first block", names)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        execute(each.code, str(each), names)
    return names, out.getvalue()


@pytest.mark.parametrize("each", [each for each in ALL if not needs_more(each)], ids=str)
def test_it_runs_as_pasted(each):
    names, shown = run(each)
    for (page, mark), check in CHECKS.items():
        if each.page == page and mark in each.code:
            check(types.SimpleNamespace(**names), shown)


def the_line_counts_the_steps_of_all_epochs(names, shown):
    assert names.step == 6


def a_whole_run(names, shown):
    assert names.merger.step_count == 6
    assert "merges expected at step 0" in shown
    assert "6 optimizer steps: " in shown


def name_patterns_are_those_of_torchvision(names, shown):
    assert names.merger.plan.names[0] == "layer2.0.conv1"
    assert not [name for name in names.merger.plan.names if "downsample" in name]
    patterns = re.search(r"of VGG19: (\[.*?\])", text_of("docs/training.md"))[1]
    plan = inmerge_fast.MergePlan(nets.vgg19(hidden=8), skip_first=ast.literal_eval(patterns))
    assert plan.names[0] == "features.5"


def a_file_is_left(names, shown):
    assert names.torch.load("run.pt")["merger"] == names.merger.state_dict()


def a_picture_is_left(names, shown):
    assert os.path.getsize("merges.png") > 0
    assert "layer4.1.conv2" in shown


def statistics_are_of_the_restored_weights(names, shown):
    assert names.merger.step_count == 3
    assert names.merger.summary().merged > 0
    assert lease_of(names.model.conv1.weight) is None
    seen = torch.cat([names.model.conv1(x) for x, _ in names.loader])
    torch.testing.assert_close(names.model.bn1.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def nothing_stays_merged(names, shown):
    assert names.step == 2
    assert all(lease_of(weight) is None for weight in names.model.parameters())


def the_rank_is_shown(names, shown):
    assert "eff. rank" in shown


CHECKS = {
    ("docs/training.md", "step += 1"): the_line_counts_the_steps_of_all_epochs,
    ("docs/training.md", ".preview()"): a_whole_run,
    ("docs/training.md", "steps_per_epoch"): name_patterns_are_those_of_torchvision,
    ("docs/training.md", "load_state_dict"): a_file_is_left,
    ("docs/training.md", "plot_merges"): a_picture_is_left,
    ("docs/training.md", "update_bn"): statistics_are_of_the_restored_weights,
    ("docs/training.md", "inmerge_fast.merged"): nothing_stays_merged,
    ("docs/thresholds.md", ".matrix("): the_rank_is_shown,
}


def test_every_check_belongs_to_one_block():
    for page, mark in CHECKS:
        assert snippet(page, mark)


@pytest.mark.parametrize("each", [each for each in ALL if PROCESSES in each.code], ids=str)
def test_it_runs_in_two_processes(each, tmp_path):
    script = tmp_path / "script.py"
    shim = "import sys, types\nfrom benchmarks import nets\nmodule = types.ModuleType('torchvision.models')\n"
    shim += "module.resnet18 = lambda num_classes: nets.resnet18(num_classes)\n"
    shim += "sys.modules.setdefault('torchvision', types.ModuleType('torchvision'))\n"
    shim += "sys.modules['torchvision.models'] = module\n"
    script.write_text(f"{'' if HAS_TORCHVISION else shim}{each.first}\n{each.code}\nassert merger.step_count == 1\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("each", [each for each in ALL if GPU in each.code], ids=str)
def test_it_runs_on_a_gpu(each):
    names, _ = run(each)
    assert names["merger"].step_count == 10


def numbers_and_words(text):
    """Words in their order, and numbers apart: another processor sums a convolution in another order."""
    return re.sub(r"[\d,]*\d(?:\.\d+)?", "#", text).split(), [
        float(number.replace(",", "")) for number in re.findall(r"[\d,]*\d(?:\.\d+)?", text)
    ]


def test_the_quick_start_prints_what_the_readme_shows():
    [each] = snippets(HELD_TO_ITS_OUTPUT)
    [shown] = [match[2] for match in BLOCK.finditer(text_of("README.md")) if match[1] == "text"]
    names, printed = run(each)
    words, numbers = numbers_and_words(printed)
    shown_words, shown_numbers = numbers_and_words(shown)
    assert words == shown_words
    # What depends on no similarity is the same everywhere: steps, filters, sampled pairs. Ranks and merges nearly so.
    rows = names["merger"].summary().rows()
    for each in ("80 optimizer steps", f"{sum(row['sampled'] for row in rows):,} sampled pairs"):
        assert each in shown
    for row in rows:
        assert re.search(rf"^{row['name']} +{row['filters']} +{row['sampled']:,} ", shown, re.MULTILINE)
    for number, there in zip(numbers, shown_numbers, strict=True):
        assert number == pytest.approx(there, rel=0.1, abs=3)


def test_the_commands_that_look_at_files(monkeypatch, capsys, tmp_path):
    """Those of docs/inspect.md, at files as it says they are."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    net = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3) for _ in range(12)))
    torch.save(net.state_dict(), "net.pt")
    named = {f"backbone.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"model": net.state_dict(), "ema": named}, "trained.ckpt")
    [bash] = [match[2] for match in BLOCK.finditer(text_of("docs/inspect.md")) if match[1] == "bash"]
    commands = [shlex.split(line, comments=True)[3:] for line in bash.splitlines() if " inmerge_fast inspect " in line]
    assert [command[1] for command in commands] == ["net.pt", "trained.ckpt"]
    for command in commands:
        assert main(command) in (None, 0)
    shown = capsys.readouterr().out
    assert "backbone.11.weight" in shown or "backbone.11" in shown
    assert (tmp_path / "table.csv").stat().st_size > 0


ROWS = re.compile(r'^\| `"(\w+)"`.*\| (\d)(?:: ([\w, ]+)|, the same) \|$', re.MULTILINE)


def test_every_partner_rule_is_in_the_table():
    assert [row[0] for row in ROWS.findall(text_of("docs/partners.md"))] == list(PARTNER_RULES)


@pytest.mark.interpreted
def test_launches_are_as_many_as_the_table_says(monkeypatch):
    pytest.importorskip("triton")
    from interpreter import apply_fixes

    from inmerge_fast.paths.triton.handle import Handle

    apply_fixes()
    monkeypatch.setenv("INMERGE_INTERPRET", "1")
    launched = []
    launch = Handle.launch

    def counted(self, *arguments):
        launched.append(self._kernel.fn.__name__.strip("_").removesuffix("_kernel"))
        return launch(self, *arguments)

    monkeypatch.setattr(Handle, "launch", counted)
    said = {row[0]: row[1:] for row in ROWS.findall(text_of("docs/partners.md"))}
    for rule in PARTNER_RULES:
        launched.clear()
        inmerge_fast.merge_([torch.randn(8, 8), torch.randn(6, 4)], partner=rule, seed=0, step=0)  # of one kind
        count, names = said[rule]
        assert len(launched) == int(count)
        assert names in ("", ", ".join(launched))
    assert launched == ["draw", "list", "match", "count", "merge"]
