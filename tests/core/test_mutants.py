"""What `make mutants` makes of the project, and how it counts; mutmut itself is not run."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mutants
import pytest
import yaml
from mutants_read import BadEntryError, Mutant, changed, forget_missed, read_explained, read_mutants, sample
from mutants_stage import EQUAL, plain_functions

SETTINGS = yaml.safe_load(mutants.SETTINGS.read_text())
ROOT = Path(__file__).parents[2]

DECORATED = """
from contextlib import contextmanager
from functools import cache, cached_property, lru_cache

calls = []


@cache
def once(x):
    calls.append(x)
    return x + 1


@lru_cache(
    maxsize=2,
)
def sized(x):
    return x


@contextmanager
def inside():
    yield "inside"


class Thing:
    @property
    def value(self):
        return 3

    @cached_property
    def kept(self):
        calls.append("kept")
        return 4

    @classmethod
    def made(cls):
        return cls()

    @staticmethod
    @cache
    def static(x):
        return x
"""


def test_functions_without_decorators_mean_the_same() -> None:
    plain = plain_functions(DECORATED)
    assert [line.strip() for line in plain.splitlines() if "@" in line] == ["@classmethod"]
    seen = []
    for source in (DECORATED, plain):
        names: dict[str, Any] = {}
        exec(source, names)
        thing = names["Thing"].made()
        with names["inside"]() as inside:
            results = [names["once"](1), names["once"](1), thing.value, thing.kept, thing.kept, inside]
        results += [thing.static(5), names["sized"](1), names["sized"].cache_info().maxsize]
        seen.append((results, names["calls"]))
    assert seen[0] == seen[1] == ([2, 2, 3, 4, 4, "inside", 5, 1, 2], [1, "kept"])


def mutant(**changes: Any) -> Mutant:
    of: dict[str, Any] = {
        "name": "m.x_f__mutmut_1", "file": "a.py", "function": "f", "line": "return 1",
        "mutant": "return 2", "diff": "-return 1\n+return 2", "state": "caught",
    }  # fmt: skip
    return Mutant(**(of | changes))


def many(number: int) -> list[Mutant]:
    return [mutant(name=f"m.x_f__mutmut_{i}", mutant=f"return {i}") for i in range(number)]


def test_a_seed_names_a_sample() -> None:
    first = sample(many(300), 50, "1")
    assert len(set(first)) == 50
    assert sample(list(reversed(many(300))), 50, "1") == first
    # Another mutant takes a place of one at most.
    assert len(set(sample(many(301), 50, "1")) & set(first)) >= 49
    assert len(set(sample(many(300), 50, "2")) & set(first)) < 25


MADE = """\
@_mutmut_mutated(mutants)
def total(a, b):
    c = a + b
    return c
def xǁSumǁtotal__mutmut_orig(a, b):
    c = a + b
    return c
def xǁSumǁtotal__mutmut_1(a, b):
    c = a - b
    return c
def xǁSumǁtotal__mutmut_2(a, b):
    c = None
    return c
"""


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder as mutmut leaves it, with two mutants of one file and a file without any."""
    folder = tmp_path / "fse_patch" / "fusion_core"
    folder.mkdir(parents=True)
    name = "xǁSumǁtotal__mutmut_"
    (folder / "sum.py").write_text(MADE)
    spans = {f"{name}orig": [5, 7], f"{name}1": [8, 10], f"{name}2": [11, 13]}
    (folder / "sum.py.spans").write_text(json.dumps({"version": 1, "spans": spans}))
    codes = {f"fse_patch.fusion_core.sum.{name}{n}": code for n, code in ((1, 1), (2, 0))}
    (folder / "sum.py.meta").write_text(json.dumps({"exit_code_by_key": codes, "other": 1}))
    (folder / "empty.py.meta").write_text(json.dumps({"exit_code_by_key": {}}))
    return tmp_path


def test_mutants_are_read_with_their_change(made: Path) -> None:
    first, second = read_mutants(made)
    assert (first.file, first.function) == ("fusion_core/sum.py", "Sum.total")
    assert (first.line, first.mutant, first.state) == ("c = a + b", "c = a - b", "caught")
    assert (second.line, second.mutant, second.state) == ("c = a + b", "c = None", "survived")
    assert "-    c = a + b\n+    c = None" in second.diff


def test_of_equal_lines_each_has_the_one_above() -> None:
    before = ["def f():", "    if a:", "        break", "    else:", "      break", "    break"]
    changes = []
    for number in (2, 4, 5):
        after = [line.replace("break", "return") if n == number else line for n, line in enumerate(before)]
        changes.append(changed(before, after))
    assert changes == [
        ("if a: break", "if a: return"),
        ("else: break", "else: return"),
        ("break break", "break return"),
    ]
    assert changed(before, before[:1]) == ("if a: break else: break break", "")


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (None, "not run"), (0, "survived"), (33, "no test"), (5, "no test"), (1, "caught"), (2, "caught"),
        (255, "caught"), (-11, "caught"), (-24, "by time"), (152, "by time"),
    ],
)  # fmt: skip
def test_how_a_mutant_ended(made: Path, code: int | None, state: str) -> None:
    meta = made / "fse_patch" / "fusion_core" / "sum.py.meta"
    known = json.loads(meta.read_text())
    known["exit_code_by_key"] = dict.fromkeys(known["exit_code_by_key"], code)
    meta.write_text(json.dumps(known))
    assert {m.state for m in read_mutants(made)} == {state}
    assert {m.caught for m in read_mutants(made)} == {state in ("caught", "by time")}
    forget_missed(made)
    kept = state if state in ("caught", "by time") else "not run"
    assert {m.state for m in read_mutants(made)} == {kept}
    assert json.loads(meta.read_text())["other"] == 1


def test_nine_of_ten_are_too_few(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [*many(9), mutant(state="survived", mutant="return 99")]
    assert mutants.report(chosen, {}, 0.92) == 1
    shown = capsys.readouterr().out
    assert "survived: a.py, f\n-return 1\n+return 2" in shown
    assert "9 of 10 mutants caught: 90.0 %, 92 % are asked for" in shown
    assert mutants.report(chosen, {}, 0.9) == 0
    # One that is explained does not count, and is not shown.
    capsys.readouterr()
    assert mutants.report(chosen, {chosen[-1].identity: "the same"}, 0.92) == 0
    shown = capsys.readouterr().out
    assert "survived: a.py" not in shown
    assert "9 of 9 mutants caught" in shown


def test_an_explained_mutant_that_is_caught_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = many(10)
    assert mutants.report(chosen, {chosen[0].identity: "the same"}, 0.92) == 1
    assert "explained as equal, but a test notices it: a.py, f: return 0" in capsys.readouterr().out


def test_what_is_chosen() -> None:
    all_of_them = [*many(30), mutant(file="fusion_core/b/c.py")]
    options = argparse.Namespace(only=["*"], sample=None, seed="1")
    assert mutants.choose(all_of_them, set(), options) == all_of_them
    options.only = ["fusion_core/b/*"]
    assert mutants.choose(all_of_them, set(), options) == all_of_them[-1:]
    # None of a sample is explained already; a run of all has them, and holds explanations against the tests.
    options = argparse.Namespace(only=["*"], sample=31, seed="1")
    assert all_of_them[3] not in mutants.choose(all_of_them, {all_of_them[3].identity}, options)
    assert len(mutants.choose(all_of_them, {all_of_them[3].identity}, options)) == 30


ENTRY = {"file": "a.py", "function": "f", "line": "return 1", "mutant": "return 2"}


def test_explanations_are_read(tmp_path: Path) -> None:
    file = tmp_path / "equal.yaml"
    file.write_text(yaml.safe_dump([{"why": "the same", "mutants": [ENTRY | {"line": "return  1\n"}]}]))
    explained = read_explained(file)
    assert mutants.stale(explained, [mutant()]) == []
    assert mutants.stale(explained, [mutant(mutant="return 3")]) == [mutant().identity]


@pytest.mark.parametrize(
    "groups",
    [
        [{"why": "the same", "mutants": [ENTRY, ENTRY]}],
        [{"why": "", "mutants": [ENTRY]}],
        [{"why": "the same", "mutants": []}],
        [{"why": "the same", "mutants": [{**ENTRY, "who": "me"}]}],
        [{"why": "the same", "mutants": [{"file": "a.py"}]}],
        [{"why": "the same", "mutants": ["a.py"]}],
        [{"mutants": [ENTRY]}],
        ["a.py"],
    ],
)
def test_a_bad_explanation_is_bad_input(tmp_path: Path, groups: Any) -> None:
    file = tmp_path / "equal.yaml"
    file.write_text(yaml.safe_dump(groups))
    with pytest.raises(BadEntryError, match=r"equal\.yaml: "):
        read_explained(file)


def test_every_explained_line_stands_in_the_core() -> None:
    for file, function, line, _ in read_explained(EQUAL):
        text = " ".join((ROOT / file).read_text(encoding="utf-8").split())
        assert f"def {function.rpartition('.')[2]}(" in text, (file, function)
        assert " ".join(line.split()) in text, (file, line)


def test_every_test_that_is_left_out_is_there() -> None:
    tests = [test for group in SETTINGS["left_out"] for test in group["tests"]]
    assert tests
    for test in tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text(), test


def test_a_run_of_no_mutant_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutants, "stage", lambda settings, keep: False)
    monkeypatch.setattr(mutants, "run_in_stage", lambda command, progress: 0)
    monkeypatch.setattr(mutants, "read_explained", lambda path: {})
    monkeypatch.setattr(mutants, "read_mutants", lambda made: many(3))
    assert mutants.main(["--only", "none/*"]) == 2
    monkeypatch.setattr(
        mutants, "read_mutants", lambda made: [replace(m, file="fusion_core/a.py") for m in many(3)]
    )
    assert mutants.main(["--only", "a.py"]) == 0
    monkeypatch.setattr(mutants, "read_explained", lambda path: {("b.py", "f", "1", "2"): "the same"})
    assert mutants.main(["--only", "a.py"]) == 1
