"""``--help`` of every command says what it does, what it needs, and gives lines to copy that parse."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from inmerge_fast import __main__ as command

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted(
    f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("*.py") if "ArgumentParser" in path.read_text()
    or "parser_with(" in path.read_text() or "parser_of(" in path.read_text()
)  # fmt: skip
COMMANDS = ["inmerge_fast", "inmerge_fast inspect", "benchmarks.paper", "benchmarks.whole_runs", *BENCHMARKS]


def help_of(name, capsys, *arguments):
    module, *words = name.split()
    if module == "inmerge_fast":
        main = command.main
    else:
        folder = (ROOT / module.replace(".", "/")).is_dir()
        main = importlib.import_module(f"{module}.__main__" if folder else module).main
    with pytest.raises(SystemExit) as stopped:
        main([*words, *arguments])
    return stopped.value.code, capsys.readouterr()


def test_all_commands_are_looked_at():
    assert len(BENCHMARKS) >= 9
    assert {"benchmarks.bench_merge", "benchmarks.report", "benchmarks.run_gpu"} <= set(BENCHMARKS)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("benchmarks.command", "benchmarks.helps")])
def test_help_answers_a_newcomer(name, capsys):
    code, said = help_of(name, capsys, "--help")
    assert code == 0
    usage, _, rest = said.out.partition("\n\n")
    program = "bash benchmarks/run_gpu.sh" if name == "benchmarks.run_gpu" else f"python -m {name}"
    assert usage.startswith(f"usage: {program}")
    does = rest[: re.search(r"^(?:positional arguments|options):", rest, re.MULTILINE).start()]
    assert len(does) > 100, "what it does"
    assert re.search(r"^needs: \w", rest, re.MULTILINE)
    examples = re.search(r"^examples?:\n((?:  .+\n?)+)", rest, re.MULTILINE)[1]
    assert program in examples
    assert "``" not in said.out


@pytest.mark.parametrize(
    "name", ["benchmarks.bench_merge", "benchmarks.paper", "inmerge_fast", "benchmarks.whole_runs"]
)
def test_examples_have_options_that_there_are(name, capsys):
    _, said = help_of(name, capsys, "--help")
    examples = re.search(r"^examples?:\n((?:  .+\n?)+)", said.out, re.MULTILINE)[1]
    for line in examples.splitlines():
        words = shlex.split(line, comments=True)
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"^  (?:-\w, )?{option}\b", said.out, re.MULTILINE) or "inspect" in words, (line, option)
