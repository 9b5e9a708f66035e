"""``benchmarks/run_gpu.sh`` brings home what there is, whatever its steps do: the real script with steps of our own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_parts, report, result_files, run_gpu

ROOT = Path(__file__).parents[1]
NINE_MINUTES = 540
FILES_HOME = 8  # of a part, at most: more may not be brought home

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def stub_python(tmp_path):
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/stub_step.py" "$@"\n')
    path.chmod(0o755)
    return str(path)


def command(folder, *arguments, python):
    return ["bash", str(ROOT / "benchmarks" / "run_gpu.sh"), str(folder), *arguments, "--python", python]


def environment(**steps):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return kept | {"STUB_STEPS": json.dumps(steps), "PYTHON": sys.executable}


def run(folder, *arguments, python, **steps):
    done = subprocess.run(
        command(folder, *arguments, python=python),
        env=environment(**steps),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    return done


def outcomes(folder):
    """How each step ended, by the summary."""
    lines = (folder / "summary.txt").read_text().splitlines()
    assert all(lines)
    found = [re.fullmatch(r"(\S+) +(?:\d+ s  (.*)|(skipped: .*))", line) for line in lines]
    return {match[1]: match[2] or match[3] for match in found if match}


def steps_of(part):
    return {step.name: step for group in gpu_parts.PARTS[part] for step in group}


def files_below(folder):
    return [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize("part", gpu_parts.PARTS)
def test_a_part_takes_less_than_nine_minutes_whatever_happens(part):
    assert gpu_parts.worst_case(part) < NINE_MINUTES
    for step in steps_of(part).values():
        assert step.expected < step.limit


def test_names_are_unique_and_the_listing_has_all_of_them():
    names = [step.name for groups in gpu_parts.PARTS.values() for group in groups for step in group]
    assert len(set(names)) == len(names)
    assert not {*gpu_parts.PARTS} & {*names}
    done = subprocess.run(["bash", str(ROOT / "benchmarks/run_gpu.sh"), "--list"], capture_output=True, text=True,
                          env=environment())  # fmt: skip
    assert set(names) <= set(done.stdout.split())
    for part in gpu_parts.PARTS:
        assert f"{part}: " in done.stdout


def test_every_gpu_test_is_in_one_step():
    """By collecting them; a new file with GPU tests goes into ``benchmarks/gpu_parts.py``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    collect = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(collect, cwd=ROOT, env=kept, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(found) > 200, done.stdout[-2000:]
    times = dict.fromkeys(found, 0)
    for step in steps_of("correct").values():
        files = [word for word in step.command if word.endswith(".py")]
        keyword = step.command[step.command.index("-k") + 1] if "-k" in step.command else "True"
        for test in found:
            words = re.sub(r"\b(?!(?:and|or|not|True)\b)\w+", lambda match: f"({match[0]!r} in test)", keyword)
            if test.partition("::")[0] in files and eval(words, {"test": test.partition("::")[2]}):
                times[test] += 1
    assert {test for test, count in times.items() if count != 1} <= {
        test for test in found if test.startswith("tests/test_interpreted.py")
    }, "not in exactly one step"


def test_all_steps_are_told_to_be_frugal_and_real(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen = run_gpu.Run(tmp_path, "python", True, {}).environment()
    assert "TRITON_INTERPRET" not in seen
    assert seen["INMERGE_EXAMPLES_SHARE"] == "20"
    for step in steps_of("correct").values():
        assert "faulthandler_timeout=30" in step.command, "where a test hangs is in the log"


# -------------------------------------------------------------------------------------------------- steps that go wrong

SPOILED = {"correct": "tests/test_gpu_match.py", "speed": "benchmarks.bench_host", "more": "benchmarks.bench_scaling",
           "forward-only": "benchmarks.bench_training"}  # fmt: skip
WHAT = {"correct": "test_gpu_match", "speed": "host", "more": "scaling", "forward-only": "training-forward"}
ENDS = {
    "pass": "passed: ",
    "fail": "failed with status 1: half-way",
    "hang": "reached its limit of 5 s: half-way",
    "deaf": "reached its limit of 5 s: half-way",
    "crash": "killed by SIGSEGV: ",
    "killed": "killed by SIGKILL: half-way",
}


@pytest.mark.parametrize("part", gpu_parts.PARTS)
@pytest.mark.parametrize("how", ENDS)
def test_whatever_a_step_does_the_others_run_and_all_comes_home(how, part, tmp_path, stub_python):
    folder = tmp_path / "home"
    limit = ["--limit", f"{WHAT[part]}=5"] if how in ("hang", "deaf") else []
    done = run(folder, part, *limit, python=stub_python, **{SPOILED[part]: how})
    assert done.returncode == (how != "pass"), done.stdout
    ended = outcomes(folder)
    expected = {"versions", *steps_of(part)}
    assert set(ended) == expected
    for name, outcome in ended.items():
        if name == WHAT[part]:
            assert outcome.startswith(ENDS[how]), outcome
        else:
            assert outcome.startswith("passed: ") or name == "nsight", f"{name} {outcome}"
    log = (folder / "log.txt").read_text()
    assert f"[{WHAT[part]}] half-way" in log
    if how == "crash":
        assert "Fatal Python error: Segmentation fault" in log, "where it crashed is in the log"
    assert (folder / "summary.txt").read_text().splitlines()[-1] == (
        "all passed" if how == "pass" else "1 of the steps above did not pass"
    )
    home = files_below(folder)
    assert len(home) <= FILES_HOME
    assert all(len(path.parts) <= 3 and re.fullmatch(r"[\w./-]+", str(path)) for path in home)
    found = {results.path.stem: results for results in result_files.load(folder / "results")}
    assert set(found) == {path.stem for path in home if path.suffix == ".json"}
    for name, results in found.items():
        spoiled = name == WHAT[part] and how != "pass"
        assert (len(results.rows), results.complete) == ((1, False) if spoiled else (2, True)), name
    text = report.render(list(found.values()))
    if found and how != "pass":
        assert text.count("**interrupted**") == 1


def test_a_provider_that_fails_fails_its_step_and_loses_nothing_else(tmp_path, stub_python):
    folder = tmp_path / "home"
    assert run(folder, "speed", python=stub_python, bench_training="one provider").returncode == 1
    assert outcomes(folder)["training"].startswith("failed with status 1: FAILED: {'net': 'VGG19'")
    (results,) = (found for found in result_files.load(folder / "results") if found.bench == "training")
    assert (len(results.rows), results.complete) == (2, True)
    assert results.failures[0]["error"] == "RuntimeError: out of memory"


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def test_children_of_a_step_are_ended_and_those_that_fled_are_not_waited_for(tmp_path, stub_python):
    start = time.monotonic()
    run(tmp_path / "home", "host", python=stub_python, bench_host="children")
    assert time.monotonic() - start < 30
    inside, fled = map(int, re.findall(r"\[host\] child (\d+)", (tmp_path / "home" / "log.txt").read_text()))
    fled_lives = alive(fled)
    if fled_lives:
        os.kill(fled, signal.SIGKILL)
    assert not alive(inside)
    assert fled_lives, "or the test proves nothing"
    assert outcomes(tmp_path / "home")["host"].startswith("passed: ")


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_taken_away_has_written_what_it_had(tmp_path, stub_python, signal_):
    folder = tmp_path / "home"
    steps = environment(bench_training="hang")
    with subprocess.Popen(
        command(folder, "speed", python=stub_python),
        env=steps,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        log = folder / "log.txt"
        deadline = time.monotonic() + 60
        while not (log.exists() and "[training] half-way" in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (pid,) = [int(found) for found in re.findall(r"\[training\] process (\d+)", log.read_text())]
        process.send_signal(signal_)
        process.wait(20)
        if signal_ == signal.SIGKILL:
            os.kill(pid, signal.SIGKILL)  # nobody is left to do so
    assert process.returncode == (-signal.SIGKILL if signal_ == signal.SIGKILL else 1)
    time.sleep(0.1)
    assert not alive(pid)
    ended = outcomes(folder)
    assert [name for name, outcome in ended.items() if outcome.startswith("passed")] == ["versions", "merge", "host"]
    if signal_ != signal.SIGKILL:
        assert f"interrupted by {signal_.name}" in (folder / "summary.txt").read_text()
    found = {results.path.stem: len(results.rows) for results in result_files.load(folder / "results")}
    assert found == {"merge": 2, "host": 2, "training": 1}


# -------------------------------------------------------------------------------------------------------- its arguments


def test_single_steps_can_be_named_and_options_stand_anywhere(tmp_path, stub_python):
    folder = tmp_path / "home"
    assert run(folder, "--quick", "tuning", "--limit", "tuning=50", "litmus", python=stub_python).returncode == 0
    assert list(outcomes(folder)) == ["versions", "litmus", "tuning"]


@pytest.mark.parametrize("arguments", [["corect"], ["some/folder", "corect"], ["--limit", "corect=9"]])
def test_a_slip_runs_nothing(tmp_path, arguments, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_gpu.main(arguments)
    assert "'corect' is no part" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_is_a_rehearsal(tmp_path):
    """The steps themselves, in this Python: a real benchmark, quick, and GPU tests that skip themselves."""
    folder, steps = tmp_path / "home", {"versions": 100, "test_gpu_memory": 250, "scaling": 450}
    # Their own limits are for a machine that has nothing else to do; importing PyTorch alone has taken 25 s on another.
    limits = [f"--limit={name}={seconds}" for name, seconds in steps.items()]
    done = subprocess.run(
        command(folder, *list(steps)[1:], *limits, python=sys.executable), env=environment(), capture_output=True,
        text=True, timeout=sum(steps.values()),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ended = outcomes(folder)
    assert ended["versions"] == f"passed: {gpu_parts.NO_GPU}"
    assert "3 skipped" in ended["test_gpu_memory"]
    (results,) = result_files.load(folder / "results")
    assert (results.bench, results.complete) == ("scaling", True)
    assert len(results.rows) == 8
