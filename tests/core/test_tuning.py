"""From measured ratios to a table, and what is refused on the way; no GPU needed."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from fse_patch.adapters import tuned_configs
from fse_patch.cli.app import app
from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.forward.plan import ModePlan
from fse_patch.fusion_core.forward.tuned import plan_for
from fse_patch.lab import bench, tune
from fse_patch.lab.timing import Ratio, floor_seconds, is_quiet, ratio

from .test_mode_plans import HERE

SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"


def row(tokens: int, again: float = 1.0, **ratios: float) -> dict[str, Any]:
    found: dict[str, Any] = {"tokens": tokens, "again": again, "valid": abs(again - 1) <= 0.005}
    for mode, value in ratios.items():
        found |= {f"{mode}_ratio": value, f"{mode}_lower": value - 0.004}
    return found


def test_the_fastest_mode_by_number_of_tokens() -> None:
    rows = [
        row(16, small=1.02, fused=1.01, split=1.03),
        row(1, small=1.8, fused=1.3, split=1.05),
        row(2, small=1.5, fused=1.2, split=1.04),
        row(64, fused=0.9, split=1.0),
    ]
    assert tune.steps(rows, small_up_to=16) == ([{"up_to": 2, "mode": "small"}], "split")


def test_small_is_kept_only_where_tokens_may_be_alike() -> None:
    rows = [row(1, small=1.8, split=1.05), row(2, small=1.5, fused=1.2), row(4, small=1.5, split=1.1)]
    ones: list[dict[str, Any]] = [{"up_to": 1, "mode": "small"}, {"up_to": 2, "mode": "fused"}]
    assert tune.steps(rows) == (ones, "split")
    # The control: where it was measured with all tokens alike too, its ratio counts.
    assert tune.steps(rows, small_up_to=4) == ([], "small")


def test_no_mode_that_is_slower_than_stock() -> None:
    assert tune.best_mode(row(1, small=0.98, fused=0.9)) == "slower"
    assert tune.best_mode(row(1, small=0.98, fused=0.99)) == "fused"
    # The median of one may be better; its lower bound counts.
    assert tune.best_mode({**row(1, split=0.99), "fused_ratio": 1.2, "fused_lower": 0.97}) == "split"


def test_a_row_in_which_stock_was_not_stock_is_refused() -> None:
    with pytest.raises(FsePatchError, match=r"\[2\] tokens"):
        tune.steps([row(1, split=1.1), row(2, again=0.94, split=1.1)])
    with pytest.raises(FsePatchError, match="nothing"):
        tune.steps([])


def test_a_row_that_decides_nothing_is_split_where_that_is_stock() -> None:
    wide = {**row(8192, fused=0.97), "split_ratio": 1.003, "split_lower": 0.97}
    assert tune.is_open(wide)
    assert tune.best_mode(wide) == "slower"
    assert tune.best_mode(wide, split_is_stock=True) == "split"
    # The controls: a split that is slower, another mode that is fast, and rows that leave nothing open.
    assert tune.best_mode({**wide, "split_ratio": 0.98}, split_is_stock=True) == "slower"
    assert tune.best_mode({**wide, "small_ratio": 1.1, "small_lower": 1.09}, split_is_stock=True) == "small"
    assert not tune.is_open(row(8192, fused=0.97, split=1.0))
    assert not tune.is_open(row(8192, fused=0.97, split=0.97))


def test_open_rows_are_measured_in_more_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {**row(8, fused=0.9), "split_ratio": 1.003, "split_lower": 0.97, "stock_us": 1.0, "floor_us": 1.0}
    wide |= {"fused_us": 1.0, "split_us": 1.0}
    found = iter([wide, wide, {**wide, "split_lower": 0.99}])
    asked = []

    def measure(pair: Any, tokens: int, rounds: int) -> dict[str, Any]:
        asked.append(rounds)
        return next(found)

    monkeypatch.setattr(bench, "_measure", measure)
    (kept,) = bench.measure(None, [8], 7)
    assert asked == [7, 28, 28]
    assert kept["split_lower"] == 0.99


def test_where_stock_was_off_itself_a_mode_must_win_by_as_much() -> None:
    assert tune.best_mode(row(2, again=0.98, small=1.6, split=1.0)) == "small"
    assert tune.best_mode(row(2, again=1.02, split=1.0)) == "slower"
    # The controls: by a little less it is not enough, and a valid row asks for nothing more.
    assert tune.best_mode(row(2, again=1.02, small=1.004)) == "slower"
    assert tune.best_mode(row(2, again=1.005, split=0.99)) == "split"


def test_a_table_keeps_the_rows_of_other_shapes(tmp_path: Path) -> None:
    path, other = tmp_path / "a" / "table.yaml", replace(HERE, width=128)
    tune.store(path, HERE, [row(1, small=1.5), row(2, split=1.1)], {"torch": "1"}, "test")
    tune.store(path, other, [row(1, split=1.1)], {"torch": "1"}, "test")
    tune.store(path, HERE, [row(1, small=1.5), row(8, split=1.1)], {"torch": "1"}, "test")
    mine, theirs = plan_for(HERE, "cuda", path), plan_for(other, "cuda", path)
    assert isinstance(mine, ModePlan)
    assert isinstance(theirs, ModePlan)
    assert (str(mine), str(theirs)) == ("small up to 1, split beyond", "split always")
    with pytest.raises(FsePatchError, match="give another file"):
        tune.store(path, replace(HERE, device="Other"), [row(1, split=1.1)], {}, "test")


def pair_of(native: bool = False) -> Any:
    layout = ExpertLayout(512, 1, 10, 2048, 512)
    return SimpleNamespace(layout=layout, native=native, situation=HERE)


def test_the_tables_in_use_are_those_that_were_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(native: bool, **looked_up: str) -> tuple[str, str]:
        monkeypatch.setattr(
            tuned_configs, "LOOKED_UP", {int(key[1:]): name for key, name in looked_up.items()}
        )
        return tuple(bench.tuned_tables(pair_of(native)).values())  # type: ignore[return-value]

    assert found(False, e512="E=512,N=512", e513="E=512,N=512") == ("E=512,N=512",) * 2
    assert found(False, e512="none", e513="E=513,N=512") == ("none", "E=513,N=512")
    # Stock has the slots where the engine fuses by itself; other kernels look nothing up.
    assert found(True, e512="E=512,N=512", e513="none") == ("none", "none")
    assert found(False) == ("", "")
    # The control: fused blocks that stand without the table that the engine would give them.
    with pytest.raises(FsePatchError, match=r"without the table of stock \(E=512,N=512\)"):
        found(False, e512="E=512,N=512", e513="none")


def test_rows_of_many_tokens_have_the_columns_of_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "versions", lambda engine: {"fse_patch": "0", engine: "1"})
    monkeypatch.setattr(tuned_configs, "LOOKED_UP", {512: "none", 513: "none"})
    path = tmp_path / "rows.csv"
    many = [{"tokens": 64, "stock_us": 1.23456, "split_us": 1.0}]
    bench.write_csv(path, "a", pair_of(), many, "abc")
    bench.write_csv(path, "b", pair_of(), [{"tokens": 1, "stock_us": 1.0, "small_us": 0.5}], "abc")
    with path.open(newline="") as file:
        held = list(csv.DictReader(file))
    assert [(r["shape"], r["tokens"], r["small_us"], r["split_us"]) for r in held] == [
        ("a", "64", "", "1.0"),
        ("b", "1", "0.5", ""),
    ]
    assert (held[0]["stock_us"], held[0]["stock_table"], held[0]["fused_table"]) == ("1.2346", "none", "none")
    before = path.read_text()
    # The control: a file with other columns is left as it is.
    monkeypatch.setattr(bench, "versions", lambda engine: {"fse_patch": "0", "sglang": "1"})
    with pytest.raises(FsePatchError, match="has other columns"):
        bench.write_csv(path, "b", pair_of(), many, "abc")
    assert path.read_text() == before


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_a_file_with_other_columns_is_said_before_anything_is_measured(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []

    def measure(*args: Any) -> Any:
        measured.append(args)
        raise FsePatchError("measured")

    monkeypatch.setattr(bench, "open_pair", lambda *args: pair_of())
    monkeypatch.setattr(bench, "versions", lambda engine: {engine: "1"})
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "errors", lambda pair: {"stock": [0.1], "control": [0.3]})
    extra = ["--out", str(tmp_path / "t.yaml")] if command == "tune" else []
    fresh, other = tmp_path / "fresh.csv", tmp_path / "other.csv"
    other.write_text("shape,tokens\n")
    for file, words in ((other, "has other columns"), (fresh, "measured")):
        arguments = [command, str(SHAPES / "qwen3_next_80b"), "--csv", str(file), *extra]
        result = CliRunner().invoke(app, arguments)
        assert words in str(result.exception)
    assert len(measured) == 1
    assert other.read_text() == "shape,tokens\n"


def test_ratios() -> None:
    even = ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (even.median, even.lower) == (1.0, 1.0)
    mixed = ratio([1.0] * 5, [1 / 1.2, 1 / 1.1, 1 / 1.3, 1 / 1.1, 1 / 1.2])
    assert mixed.median == pytest.approx(1.2)
    assert 1.0999 < mixed.lower < 1.2
    assert is_quiet(Ratio(1.004, 1.0))
    assert not is_quiet(Ratio(0.994, 0.99))


def test_the_floor_counts_every_chosen_expert_once() -> None:
    layout = ExpertLayout(512, 1, 10, 2048, 512)
    one = floor_seconds(layout, 1, 1, 513)
    assert one == pytest.approx((11 * 3 * 2048 * 512 + 513 * 2048) * 2 / 4.3e12)
    all_of_them = (513 * 3 * 2048 * 512 + 513 * 2048) * 2 / 4.3e12
    assert floor_seconds(layout, 1, 100_000, 513) == pytest.approx(all_of_them)


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_without_a_gpu_nothing_is_measured(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    folder = str(SHAPES / "qwen3_next_80b")
    extra = ["--out", str(tmp_path / "t.yaml")] if command == "tune" else []
    for arguments, words in (
        ([], "no CUDA device"),
        (["--engine", "sglang"], "no CUDA device"),
        (["--tokens", "1,x"], ""),
    ):
        result = CliRunner().invoke(app, [command, folder, *extra, *arguments])
        assert isinstance(result.exception, FsePatchError)
        assert words in str(result.exception)
    assert not (tmp_path / "t.yaml").exists()
