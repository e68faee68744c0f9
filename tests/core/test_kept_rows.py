"""Rows in a CSV: appended when they are measured, and taken over by a later run of the same."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from fse_patch.adapters import tuned_configs
from fse_patch.cli.app import app
from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.lab import bench
from fse_patch.lab.kept_rows import COLUMNS, KeptRows, from_csv

from .test_mode_plans import HERE

SHAPE = Path(__file__).parents[2] / "benchmarks" / "shapes" / "qwen3_next_80b"
NAMES = ["even", "alike"]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "versions", lambda engine: {"fse_patch": "0", engine: "1"})
    monkeypatch.setattr(tuned_configs, "LOOKED_UP", {512: "none", 513: "none"})


def pair() -> Any:
    layout = ExpertLayout(512, 1, 10, 2048, 512)
    return SimpleNamespace(layout=layout, native=False, situation=HERE, stock=[None] * 4)


def kept(path: Path | None, name: str = "a", commit: str = "abc", **changed: Any) -> KeptRows:
    head = bench.head(pair(), name, 7, commit) | changed
    return KeptRows(path, bench.csv_columns("vllm"), head)


def row(tokens: int, routing: str, **more: Any) -> dict[str, Any]:
    split = {"split_us": 1.0, "split_ratio": 1.1, "split_lower": 1.0923}
    found = {"tokens": tokens, "routing": routing, "again": 1.0, "valid": True, **split}
    tables = {"stock_table": "none", "fused_table": "none"}
    return {**found, "stock_us": 1.23456, "floor_us": 0.5, **tables, **more}


def measuring(monkeypatch: pytest.MonkeyPatch, stop_at: tuple[int, str] | None = None) -> list[Any]:
    """Let every row be measured as `row`; returns which ones were, up to one that ends the run."""
    asked: list[Any] = []

    def measure(pair: Any, tokens: int, name: str, rounds: int) -> dict[str, Any]:
        if (tokens, name) == stop_at:
            raise KeyboardInterrupt
        asked.append((tokens, name))
        return row(tokens, name)

    monkeypatch.setattr(bench, "_measure", measure)
    return asked


def held(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="") as file:
        return [(row["tokens"], row["routing"]) for row in csv.DictReader(file)]


def test_a_run_that_was_ended_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    measuring(monkeypatch, stop_at=(2, "alike"))
    with pytest.raises(KeyboardInterrupt):
        bench.measure(None, [1, 2, 4], NAMES, 7, kept(path))
    assert held(path) == [("4", "even"), ("4", "alike")]
    asked = measuring(monkeypatch)
    said: list[str] = []
    rows = bench.measure(None, [1, 2, 4], NAMES, 7, kept(path), said.append)
    assert asked == [(2, "even"), (2, "alike"), (1, "even")]
    several = [(tokens, name) for tokens in (2, 4) for name in NAMES]
    assert [(r["tokens"], r["routing"]) for r in rows] == [(1, "even"), *several]
    assert len(held(path)) == 5
    assert [line for line in said if line.endswith("as kept")] == [
        bench.line(row(4, name)) + ", as kept" for name in NAMES
    ]
    # A row from the file is what was measured, as the file rounds it.
    assert rows[-1] == {**row(4, "alike"), "stock_us": 1.2346}
    # One more routing is measured alone.
    asked = measuring(monkeypatch)
    bench.measure(None, [2, 4], ["zipf", *NAMES], 7, kept(path))
    assert asked == [(4, "zipf"), (2, "zipf")]


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": "b"},
        {"device": "Other"},
        {"backend": "cutlass"},
        {"quant": "fp8-block 128x128"},
        {"layers": 5},
        {"rounds": 15},
        {"fused_table": "E=512,N=512"},
        {"commit": "abd"},
        {"vllm": "2"},
        {"commit": ""},
    ],
    ids=str,
)
def test_rows_of_another_run_are_not_taken_over(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = tmp_path / "rows.csv"
    kept(path).add([row(4, "even")])
    assert kept(path).find(4, "even") is not None
    assert kept(path).find(4, "alike") is kept(path).find(2, "even") is None
    assert kept(path, **changed).find(4, "even") is None


def test_without_a_commit_nothing_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    kept(path, commit="").add([row(4, "even")])
    assert kept(path, commit="").find(4, "even") is None
    assert len(held(path)) == 1


def test_a_row_that_no_table_would_take_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    kept(path).add([row(4, "even", again=1.06, valid=False), row(2, "even", again=1.04, valid=False)])
    assert kept(path).find(4, "even") is None
    assert (kept(path).find(2, "even") or {})["valid"] is False
    # The last one counts.
    kept(path).add([row(4, "even", split_us=3.0)])
    assert (kept(path).find(4, "even") or {})["split_us"] == 3.0


def test_a_row_that_is_cut_off_is_said(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    kept(path).add([row(4, "even"), row(2, "even")])
    whole = path.read_text()
    path.write_text(whole[: whole.rindex(",even,") + 8])
    with pytest.raises(FsePatchError, match=r"rows.csv, line 3: not a whole row"):
        kept(path)
    assert not kept(path, commit="other")._found


def test_no_file_keeps_nothing() -> None:
    nowhere = kept(None)
    nowhere.add([row(4, "even")])
    assert nowhere.find(4, "even") is None


def test_rows_of_many_tokens_have_the_columns_of_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    kept(path).add([row(64, "even")])
    kept(path, "b").add([{"tokens": 1, "routing": "even", "small_us": 0.5}])
    with path.open(newline="") as file:
        many, few = csv.DictReader(file)
    assert (many["shape"], many["tokens"], many["small_us"], many["split_us"]) == ("a", "64", "", "1.0")
    assert (few["shape"], few["tokens"], few["small_us"], few["split_us"]) == ("b", "1", "0.5", "")
    assert (many["stock_us"], many["stock_table"], many["fused_table"]) == ("1.2346", "none", "none")
    assert (many["quant"], many["layers"], many["rounds"], many["commit"]) == ("none", "4", "7", "abc")
    before = path.read_text()
    # The control: a file with other columns is left as it is.
    monkeypatch.setattr(bench, "versions", lambda engine: {"fse_patch": "0", "sglang": "1"})
    with pytest.raises(FsePatchError, match="has other columns"):
        KeptRows(path, bench.csv_columns("vllm"), bench.head(pair(), "a", 7, "")).add([row(64, "even")])
    assert path.read_text() == before


def test_a_file_from_before_routings_is_even() -> None:
    old = {name: "1.0" for name in COLUMNS if name != "routing"} | {"tokens": "8", "small_us": ""}
    found = from_csv({**old, "valid": "True", "stock_table": "none", "fused_table": "none"})
    assert (found["routing"], found["tokens"], found["valid"]) == ("even", 8, True)
    assert "small_us" not in found


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_a_second_run_measures_nothing(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"stock": [0.1], "control": [0.3]}
    monkeypatch.setattr(bench, "open_pair", lambda *args: pair())
    monkeypatch.setattr(bench, "errors", lambda pair: errors)
    path, table = tmp_path / "rows.csv", tmp_path / "t.yaml"
    arguments = [command, str(SHAPE), "--csv", str(path), "--commit", "abc", "--tokens", "1,2"]
    arguments += ["--out", str(table)] if command == "tune" else []
    asked = measuring(monkeypatch)
    first = CliRunner().invoke(app, arguments)
    assert (first.exit_code, asked) == (0, [(2, "even"), (2, "alike"), (1, "even")]), first.output
    asked = measuring(monkeypatch)
    second = CliRunner().invoke(app, arguments)
    assert (second.exit_code, asked) == (0, [])
    assert second.stdout == first.stdout
    if command == "tune":
        assert "measured with the routings even, alike\n" in second.stdout
    # Without a commit it is measured anew.
    asked = measuring(monkeypatch)
    CliRunner().invoke(app, [a for a in arguments if a not in ("--commit", "abc")])
    assert len(asked) == 3
