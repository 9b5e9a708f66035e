"""What the README's section on partner rules shows can be run, and what it counts is so."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import inmerge_fast
from inmerge_fast.paths.match import PARTNER_RULES

README = (Path(__file__).parents[1] / "README.md").read_text()
SECTION = README[README.index("## Partner rules and filter similarity") :].split("\n## ")[0]


def test_snippets_run(capsys):
    snippets = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    assert len(snippets) == 2
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 32, 3))
    names = {"inmerge_fast": inmerge_fast, "model": model, "step": 0}
    for snippet in snippets:
        exec(snippet, names)
    assert "eff. rank" in capsys.readouterr().out


def test_every_rule_is_in_the_table():
    assert re.findall(r'^\| `"(\w+)"`', SECTION, re.MULTILINE) == list(PARTNER_RULES)


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
    for rule in PARTNER_RULES:
        launched.clear()
        inmerge_fast.merge_([torch.randn(8, 8), torch.randn(6, 4)], partner=rule, seed=0, step=0)  # of one kind
        row = re.search(rf'^\| `"{rule}"`.*\| (\d)(?:: ([\w, ]+)|, the same) \|$', SECTION, re.MULTILINE)
        assert len(launched) == int(row[1])
        assert row[2] in (None, ", ".join(launched))
    assert launched == ["draw", "list", "match", "count", "merge"]
