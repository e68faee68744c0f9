"""From measured ratios to a table, and what is refused on the way; no GPU needed."""

from __future__ import annotations

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
from fse_patch.lab.kept_rows import KeptRows
from fse_patch.lab.timing import Ratio, floor_seconds, is_quiet, ratio

from .test_mode_plans import HERE

SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"


def row(tokens: int, again: float = 1.0, routing: str = "even", **ratios: float) -> dict[str, Any]:
    found: dict[str, Any] = {"tokens": tokens, "routing": routing, "again": again}
    found["valid"] = abs(again - 1) <= 0.005
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
    few: list[dict[str, Any]] = [{"up_to": 2, "mode": "small"}]
    assert tune.steps(rows, small_up_to=16) == (few, "split")
    assert tune.steps(rows) == ([{"up_to": 1, "mode": "small"}, {"up_to": 2, "mode": "fused"}], "split")


def test_small_needs_a_row_of_tokens_that_are_alike() -> None:
    even = [row(1, small=1.8, split=1.05), row(2, small=1.5, split=1.1)]
    assert tune.steps([*even, row(2, routing="alike", small=1.2, split=1.1)]) == ([], "small")
    # The controls: no such row, another routing in its place, and alike without even.
    first: list[dict[str, Any]] = [{"up_to": 1, "mode": "small"}]
    for other in ([], [row(2, routing="groups", small=1.2, split=1.1)]):
        assert tune.steps([*even, *other]) == (first, "split")
    assert tune.best_mode([row(2, routing="alike", small=1.2, split=1.1)]) == "split"


def test_a_mode_that_is_slower_under_one_routing_falls_out() -> None:
    even, alike = row(4, small=1.5, fused=1.1, split=1.02), {"routing": "alike"}
    assert tune.best_mode([even, row(4, **alike, small=0.9, fused=1.1, split=1.02)]) == "fused"
    assert tune.best_mode([even, row(4, **alike, small=0.9, fused=0.9, split=1.02)]) == "split"
    assert tune.best_mode([even, row(4, **alike, small=0.9, fused=0.9, split=0.9)]) == "slower"
    # The control: where it is as fast as stock there too, the mode is taken.
    assert tune.best_mode([even, row(4, **alike, small=0.99, fused=1.1, split=1.02)]) == "small"
    # A third routing counts as much; a mode without a row under it falls out.
    assert tune.best_mode([even, row(4, **alike, small=1.2), row(4, routing="zipf", small=0.9)]) == "slower"
    # What stock is off itself counts against the row that is not valid, and no other.
    noisy = row(4, again=1.02, **alike, small=1.0, fused=1.1)
    assert tune.best_mode([even, noisy]) == "fused"


def test_among_good_modes_the_mean_of_unrelated_requests_decides() -> None:
    even, alike = row(2, small=1.6, fused=1.2), row(2, routing="alike", small=1.0, fused=3.0)
    assert tune.best_mode([even, alike, row(2, routing="zipf", small=1.0, fused=1.4)]) == "fused"
    assert tune.best_mode([even, alike, row(2, routing="zipf", small=1.0, fused=1.3)]) == "small"
    # Without any of their routings all that there is decides.
    assert tune.best_mode([alike, row(2, routing="groups", once=1.1, fused=1.0)]) == "fused"


def test_split_that_is_stock_needs_its_median_under_every_routing() -> None:
    open_rows = [
        {**row(64, routing=name, fused=0.9), "split_ratio": 1.003, "split_lower": 0.97}
        for name in ("even", "alike")
    ]
    assert tune.best_mode(open_rows, split_is_stock=True) == "split"
    open_rows[1]["split_ratio"] = 0.98
    assert tune.best_mode(open_rows, split_is_stock=True) == "slower"
    assert not tune.is_open(open_rows)


def test_words_say_which_routings_were_measured() -> None:
    both = [row(1), row(2), row(2, routing="alike")]
    assert tune.routings_in_words(both) == "measured with the routings even, alike"
    assert tune.routings_in_words(both[:2]).endswith("even; without even and alike, no small beyond 1 token")
    assert tune.routings_in_words(both[:1]) == "measured with the routings even"


def test_no_mode_that_is_slower_than_stock() -> None:
    assert tune.best_mode([row(1, small=0.98, fused=0.9)]) == "slower"
    assert tune.best_mode([row(1, small=0.98, fused=0.99)]) == "fused"
    # The median of one may be better; its lower bound counts.
    assert tune.best_mode([{**row(1, split=0.99), "fused_ratio": 1.2, "fused_lower": 0.97}]) == "split"


def test_a_row_in_which_stock_was_not_stock_is_refused() -> None:
    with pytest.raises(FsePatchError, match=r"\[2\] tokens"):
        tune.steps([row(1, split=1.1), row(2, again=0.94, split=1.1)])
    with pytest.raises(FsePatchError, match=r"\[2\] tokens"):
        tune.steps([row(2, split=1.1), row(2, again=1.06, routing="alike", split=1.1)])
    with pytest.raises(FsePatchError, match="nothing"):
        tune.steps([])


def test_a_row_that_decides_nothing_is_split_where_that_is_stock() -> None:
    wide = {**row(8192, fused=0.97), "split_ratio": 1.003, "split_lower": 0.97}
    assert tune.is_open([wide])
    assert tune.best_mode([wide]) == "slower"
    assert tune.best_mode([wide], split_is_stock=True) == "split"
    # The controls: a split that is slower, another mode that is fast, and rows that leave nothing open.
    assert tune.best_mode([{**wide, "split_ratio": 0.98}], split_is_stock=True) == "slower"
    assert tune.best_mode([{**wide, "fused_ratio": 1.1, "fused_lower": 1.09}], split_is_stock=True) == "fused"
    assert not tune.is_open([row(8192, fused=0.97, split=1.0)])
    assert not tune.is_open([row(8192, fused=0.97, split=0.97)])


def script(monkeypatch: pytest.MonkeyPatch, *found: dict[str, Any]) -> list[tuple[str, int]]:
    """Let rows be measured as given, in turn; returns what will have been asked for: routing, rounds."""
    asked: list[tuple[str, int]] = []
    waiting = iter(found)

    def measure(pair: Any, tokens: int, name: str, rounds: int) -> dict[str, Any]:
        asked.append((name, rounds))
        us = {f"{mode}_us": 1.0 for mode in tune.MODES}
        made = {**next(waiting), "stock_us": 1.0, "floor_us": 1.0}
        assert (made["tokens"], made["routing"]) == (tokens, name)
        return made | {key: value for key, value in us.items() if key.replace("_us", "_ratio") in made}

    monkeypatch.setattr(bench, "_measure", measure)
    return asked


NOWHERE = KeptRows(None, [], {})


def test_open_rows_are_measured_in_more_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {**row(8, fused=0.9), "split_ratio": 1.003, "split_lower": 0.97}
    asked = script(monkeypatch, wide, wide, {**wide, "split_lower": 0.99})
    (kept,) = bench.measure(None, [8], ["even"], 7, NOWHERE)
    assert asked == [("even", 7), ("even", 28), ("even", 28)]
    assert kept["split_lower"] == 0.99


def test_rows_of_all_routings_are_measured_again_where_together_they_are_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each has a mode that is good, and it is not the same one; split alone may be good under both.
    wide = {"split_ratio": 1.003, "split_lower": 0.97}
    even, alike = {**row(8, fused=1.1), **wide}, row(8, routing="alike", fused=0.5, split=1.0)
    asked = script(monkeypatch, even, alike, {**even, "split_lower": 0.99}, alike)
    rows = bench.measure(None, [8], ["even", "alike"], 7, NOWHERE)
    assert asked == [("even", 7), ("alike", 7), ("even", 28), ("alike", 28)]
    assert tune.best_mode(rows) == "split"
    # A row that is not valid is measured again alone.
    asked = script(monkeypatch, row(8, split=1.0), row(8, 1.01, "alike", split=1.1), alike)
    assert len(bench.measure(None, [8], ["even", "alike"], 7, NOWHERE)) == 2
    assert asked == [("even", 7), ("alike", 7), ("alike", 7)]


def test_one_token_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [row(2, split=1.0), row(2, routing="alike", split=1.0), row(1, split=1.0)]
    asked = script(monkeypatch, *found)
    rows = bench.measure(None, [1, 2], ["even", "alike"], 7, NOWHERE)
    # The larger number first, and the rows in order.
    assert [name for name, _ in asked] == ["even", "alike", "even"]
    assert [(r["tokens"], r["routing"]) for r in rows] == [(1, "even"), (2, "even"), (2, "alike")]


def test_where_stock_was_off_itself_a_mode_must_win_by_as_much() -> None:
    assert tune.best_mode([row(1, again=0.98, small=1.6, split=1.0)]) == "small"
    assert tune.best_mode([row(2, again=1.02, split=1.0)]) == "slower"
    # The controls: by a little less it is not enough, and a valid row asks for nothing more.
    assert tune.best_mode([row(1, again=1.02, small=1.004)]) == "slower"
    assert tune.best_mode([row(2, again=1.005, split=0.99)]) == "split"


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
    return SimpleNamespace(layout=layout, native=native, situation=HERE, stock=[None] * 4)


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
    one = floor_seconds(layout, 1, 10, 513)
    assert one == pytest.approx((11 * 3 * 2048 * 512 + 513 * 2048) * 2 / 4.3e12)
    mean = (201.5 * 3 * 2048 * 256 + 513 * 2048) * 1 / 4.3e12
    assert floor_seconds(layout, 2, 200.5, 513, itemsize=1) == pytest.approx(mean)


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
        (["--tokens", "1,x"], "--tokens '1,x'"),
        (["--quant", "fp8-blok"], "--quant 'fp8-blok': unknown; did you mean fp8-block?"),
        (["--csv", "/none/a.csv"], "--csv /none/a.csv: there is no such folder"),
        (
            ["--routings", "even,odd"],
            "--routings: unknown routing 'odd'; use some of even, zipf, groups, alike",
        ),
    ):
        result = CliRunner().invoke(app, [command, folder, *extra, *arguments])
        assert isinstance(result.exception, FsePatchError)
        assert words in str(result.exception)
    assert not (tmp_path / "t.yaml").exists()
