"""What `make test` and `make test-all` run, and how parts resume: nothing left out, nothing stale counted."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import envs
import pytest
import steps
import test_all
import testing

ROWS = envs.matrix()["engines"]
ROOT = Path(__file__).parents[2]


def test_one_release_of_each_engine_runs_all_but_the_long_tests():
    for engine in steps.engines(ROWS):
        here = {row["name"]: row for row in ROWS if row["engine"] == engine}
        run = testing.chosen([engine], ROWS)
        assert {step.name.partition(" ")[0] for step in run} == {
            n for n, r in here.items() if not r.get("short")
        }
        marks = [step.command[-1] for step in run]
        assert marks.count("not long") == 1
        assert set(marks) == {"not long", "every_release and not long"}


def test_everything_is_every_step_once_and_the_longest_first():
    run = [step.name for step in testing.chosen(testing.everything(ROWS), ROWS)]
    by_kind = testing.chosen(["lint", "core", "kernels", *steps.engines(ROWS)], ROWS)
    assert sorted(run) == sorted(step.name for step in by_kind)
    beside = [name for name in run if name not in {step.name for step in steps.lint()}]
    whole = [f"{row['name']} tests" for row in ROWS if row.get("whole")]
    assert beside[: len(whole)] == whole


@pytest.mark.parametrize("given", ["", "3"])
def test_a_step_has_one_thread_where_nothing_else_is_said(monkeypatch, tmp_path, given):
    monkeypatch.setattr(testing, "LOGS", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert testing.run(steps.Step("threads", [sys.executable, "-c", code], 60)).closing == (given or "1")


@pytest.mark.parametrize("engine", steps.engines(ROWS))
def test_every_test_file_of_an_engine_is_in_one_group(engine):
    files = [file for group in test_all.groups(engine).values() for file in group]
    assert sorted(files) == sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests" / engine).glob("test_*.py")
    )


def test_every_release_has_every_group():
    parts = test_all.parts(ROWS)
    assert {"mypy", "core-tests", "kernel-tests"} <= set(parts)
    for row in ROWS:
        if row.get("short"):
            assert [name for name in parts if name.startswith(row["name"])] == [f"{row['name']}-short"]
            assert parts[f"{row['name']}-short"].command[3:] == [
                f"tests/{row['engine']}/test_verify.py", "-m", "every_release and not long",
            ]  # fmt: skip
            continue
        for group in test_all.groups(row["engine"]):
            arguments = parts[f"{row['name']}-{group}"].command[3:]
            # No other marks: the long tests too. A release on the packages of another shows what is its own.
            assert [a for a in arguments if not a.startswith("tests/")] == (
                ["-m", "not one_release"] if "base" in row else []
            )


@pytest.mark.parametrize(
    ("closing", "counts"),
    [
        ("2 failed, 216 passed in 2223.46s (0:37:03)", {"passed": 216, "failed": 2, "skipped": 0}),
        (
            "1 failed, 3 passed, 2 skipped, 9 deselected, 4 errors in 0.50s",
            {"passed": 3, "failed": 5, "skipped": 2},
        ),
        ("Success: no issues found in 160 source files", {}),
        ("", {}),
    ],
)
def test_tests_are_counted_by_pytests_last_line(closing, counts):
    assert test_all.counts(closing) == counts


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip


class Project:
    """A repository with one file, and parts: each appends to a log, and fails if a file has its name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran = folder, folder / "ignored" / "ran"
        self.ran.parent.mkdir()
        (folder / ".gitignore").write_text("ignored/\n")
        (folder / "source").write_text("one")
        git(folder, "init", "-q")
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", "one")

    def part(self, name: str, before_it_ends: str = "") -> steps.Step:
        code = (
            f"import sys, pathlib; ran = pathlib.Path({str(self.ran)!r}); "
            f"ran.open('a').write({name!r} + ' '); {before_it_ends or 'pass'}; "
            f"sys.exit((ran.parent / {name!r}).exists())"
        )
        return steps.Step(name, [sys.executable, "-c", code], 60)

    def started(self) -> list[str]:
        """Parts that ran since this was last asked."""
        text = self.ran.read_text() if self.ran.exists() else ""
        self.ran.unlink(missing_ok=True)
        return sorted(text.split())


@pytest.fixture
def project(tmp_path, monkeypatch):
    made = Project(tmp_path)
    monkeypatch.setattr(test_all, "ROOT", tmp_path)
    monkeypatch.setattr(testing, "ROOT", tmp_path)
    monkeypatch.setattr(test_all, "STAMPS", tmp_path / "ignored" / "stamps")
    monkeypatch.setattr(testing, "LOGS", tmp_path / "ignored" / "logs")
    monkeypatch.setattr(test_all, "parts", lambda _: {name: made.part(name) for name in ("a", "b")})
    return made


def test_what_passed_is_not_run_again_and_what_failed_is(project, capsys):
    (project.ran.parent / "b").touch()
    assert test_all.main([]) == 1
    assert project.started() == ["a", "b"]
    assert "FAILED" in capsys.readouterr().out
    (project.ran.parent / "b").unlink()
    assert test_all.main([]) == 0
    assert project.started() == ["b"]
    assert test_all.main([]) == 0
    assert project.started() == []
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["source", "new file"])
def test_a_changed_tree_runs_again(project, change):
    assert test_all.main([]) == 0
    # The control: what git ignores is no part of the tree.
    (project.folder / "ignored" / "any").write_text("two")
    assert test_all.main([]) == 0
    assert project.started() == ["a", "b"]
    (project.folder / change).write_text("two")
    assert test_all.main(["a"]) == 0
    assert project.started() == ["a"]
    assert test_all.main([]) == 0
    assert project.started() == ["b"]


def test_a_commit_of_the_same_files_is_the_same_tree(project, capsys):
    (project.folder / "source").write_text("two")
    assert test_all.main([]) == 0
    git(project.folder, "commit", "-qam", "two")
    assert test_all.main([]) == 0
    assert project.started() == ["a", "b"]
    # On which commit it ran, with a plus for what was not in it.
    assert "+\n" in capsys.readouterr().out


def test_a_part_that_is_named_runs_though_it_passed(project, capsys):
    assert test_all.main([]) == 0
    project.started()
    assert test_all.main(["b"]) == 0
    assert project.started() == ["b"]
    assert test_all.main(["c"]) == 2
    assert "no part 'c'; there are a, b" in capsys.readouterr().err
    assert project.started() == []


def test_files_that_change_while_a_part_runs_are_no_tree_that_it_passed_on(project, monkeypatch):
    change = f"(ran.parent.parent / 'source').write_text({'two'!r})"
    changing = {"a": project.part("a", change), "b": project.part("b")}
    monkeypatch.setattr(test_all, "parts", lambda _: changing)
    assert test_all.main(["a"]) == 1
    assert test_all.state(test_all.read("a"), test_all.tree()) == "not run"


def test_a_part_that_was_cut_off_is_run_again(project):
    assert test_all.main([]) == 0
    project.started()
    stamp = test_all.STAMPS / "a.json"
    stamp.write_text(stamp.read_text()[:20])
    assert test_all.main([]) == 0
    assert project.started() == ["a"]


def test_when_it_is_interrupted_what_runs_is_ended_and_has_no_stamp(project):
    code = f"""
import signal, sys
sys.path.insert(0, {str(ROOT / "ci")!r})
import pathlib, steps, test_all, testing
test_all.ROOT = testing.ROOT = folder = pathlib.Path({str(project.folder)!r})
test_all.STAMPS, testing.LOGS = folder / "ignored" / "stamps", folder / "ignored" / "logs"
signal.signal(signal.SIGTERM, signal.default_int_handler)
sleep = "import os, time; open('ignored/pid', 'w').write(str(os.getpid())); time.sleep(60)"
parts = [steps.Step(name, [sys.executable, "-c", sleep], 60) for name in ("a", "b", "c")]
test_all.parts = lambda _: {{part.name: part for part in parts}}
sys.exit(test_all.main([]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid, begun = project.folder / "ignored" / "pid", time.monotonic()
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() - begun < 30
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=45)
    assert process.returncode == 130
    assert "not passed: a, b, c" in output
    assert list((project.folder / "ignored").glob("stamps/*.json")) == []
    assert not Path("/proc", pid.read_text()).exists()


def test_without_git_nothing_counts_as_passed(project, monkeypatch):
    monkeypatch.setattr(test_all, "git", lambda *_: "")
    assert test_all.main([]) == 1
    assert test_all.main([]) == 1
    assert project.started() == ["a", "a", "b", "b"]


def test_the_table_says_how_each_part_stands(project, capsys):
    (project.ran.parent / "a").touch()
    assert test_all.main(["a"]) == 1
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["a", "FAILED"] in lines
    assert ["b", "not"] in lines


def test_steps_that_run_alone_run_before_the_others():
    spans = {}

    def run(step):
        begun = time.monotonic()
        time.sleep(0.2)
        spans[step.name] = (begun, time.monotonic())
        return testing.Result(step, 0.2, 0, "")

    wanted = [steps.Step(name, [], 1, alone=name in "bd") for name in "abcd"]
    assert [result.step.name for result in testing.run_all(wanted, run)] == list("abcd")
    assert spans["b"][1] <= spans["d"][0]
    assert max(spans[name][1] for name in "bd") <= min(spans[name][0] for name in "ac")
    # The control: the others run side by side.
    assert spans["a"][0] < spans["c"][1]
    assert spans["c"][0] < spans["a"][1]
