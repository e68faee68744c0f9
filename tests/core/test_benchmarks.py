"""Decode steps end to end: the parent against scripted arms that take known times."""

from __future__ import annotations

import csv
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from fse_patch.adapters.patching import guards
from fse_patch.cli import app, bench_end_to_end
from fse_patch.cli import verify as cli_verify
from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision.decide import decide_roles
from fse_patch.lab import decode_arm, end_to_end, live_arms, readings
from fse_patch.lab.live_arms import ARMS, ArmError
from fse_patch.lab.plots import _streams_panel, draw

from .decode_arm import LAYERS
from .outcomes import merged

MS = {"stock": 3.0, "fused": 2.0, "again": 3.0}
SHAPE = Path(__file__).parents[2] / "benchmarks" / "shapes" / "qwen3_next_80b"


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_arms, "ARM", "tests.core.decode_arm")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def job(tmp_path: Path, **changed: Any) -> end_to_end.Job:
    script = {"ms": MS, "prompt": 7.0, "notes": str(tmp_path / "notes"), **changed.pop("script", {})}
    given = {"streams": (1, 4), "rounds": 6, "limit": 30.0, "lengths": readings.Lengths(repeats=1)}
    given |= {"engine_args": script, **changed}
    return end_to_end.Job(tmp_path, "vllm", tuple(LAYERS), 1000, **given)


def notes(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("steps", [True, False])
def test_rows_have_the_known_times(tmp_path: Path, steps: bool) -> None:
    raw = tmp_path / "raw.json"
    found = end_to_end.measure(job(tmp_path, script={"steps": steps}), raw=raw)
    assert all(bool(reading["short"]) != steps for reading in found.readings)
    one, four = end_to_end.rows(found.readings)
    for row, streams in ((one, 1), (four, 4)):
        ms = [round(row[f"{name}_ms"], 6) for name in ARMS]
        assert ms == [3.0 * streams, 2.0 * streams, 3.0 * streams]
        assert (row["streams"], row["rounds"], row["different_tokens"]) == (streams, 6, streams)
        assert row["ratio"] == pytest.approx(1.5)
        assert row["lower"] == pytest.approx(1.5)
        assert row["again"] == pytest.approx(1.0)
        assert row["valid"] is True
    held = json.loads(raw.read_text())
    assert held["readings"] == found.readings
    assert held["arms"]["fused"]["versions"] == {"fse_patch": "0", "vllm": "0"}
    assert held["reports"]["fused"]["roles"]


def test_a_second_stock_that_is_not_like_the_first_makes_rows_invalid(tmp_path: Path) -> None:
    script = {"ms": {**MS, "again": 3.0 * 1.006}}
    found = end_to_end.measure(job(tmp_path, rounds=1, script=script))
    assert [row["valid"] for row in end_to_end.rows(found.readings)] == [False, False]


def test_arms_work_in_turn_and_none_always_follows_the_same(tmp_path: Path) -> None:
    end_to_end.measure(job(tmp_path))
    asked = [note for note in notes(tmp_path) if note["do"] == "decode"]
    warm, taken = asked[: 2 * 2 * 3], asked[2 * 2 * 3 :]
    assert {(n["arm"], n["streams"], n["tokens"]) for n in warm} == {
        (name, streams, tokens) for name in ARMS for streams in (1, 4) for tokens in (33, 289)
    }
    # Of each reading a long and a short answer; all streams of a round before the next one begins.
    pairs = list(zip(taken[::2], taken[1::2], strict=True))
    assert all(
        (a["arm"], a["tokens"], b["arm"], b["tokens"]) == (a["arm"], 289, a["arm"], 33) for a, b in pairs
    )
    assert [a["streams"] for a, _ in pairs] == [1, 1, 1, 4, 4, 4] * 6
    orders = [tuple(a["arm"] for a, _ in pairs[i : i + 3]) for i in range(0, len(pairs), 3)]
    assert {frozenset(order) for order in orders} == {frozenset(ARMS)}
    assert len(set(orders)) == 6
    assert not any(alive(pid) for pid in {note["pid"] for note in asked})


def test_many_streams_take_a_shorter_answer() -> None:
    lengths = readings.Lengths()
    assert [lengths.long_for(streams) for streams in (1, 16, 17, 64)] == [289, 289, 161, 161]


def test_what_holds_a_host_up_once_is_not_in_a_reading_of_few_streams(tmp_path: Path) -> None:
    script = {"hiccup": 0.5}
    for repeats, close in ((3, True), (1, False)):
        lengths = readings.Lengths(repeats=repeats, short_steps=1)
        found = end_to_end.measure(job(tmp_path, rounds=1, script=script, lengths=lengths))
        assert {r["streams"]: len(r["long"]) for r in found.readings} == {1: repeats, 4: 1}
        one = [r["ms"] for r in found.readings if (r["streams"], r["arm"]) == (1, "stock")]
        # The control: a reading of one answer has it.
        assert (abs(one[0] - MS["stock"]) < 1e-6) == close
        assert all(r["held_up"] == [0.5] * len(r["long"]) for r in found.readings)


def test_steps_that_took_twice_as_long_were_held_up() -> None:
    even = [float(step) for step in range(10)]
    assert decode_arm.held_up(even) == 0.0
    assert decode_arm.held_up([]) is decode_arm.held_up([1.0]) is None
    assert decode_arm.held_up([*even[:5], *(step + 3.0 for step in even[5:])]) == 3.0


def test_rows_of_two_engines_have_a_file_each(tmp_path: Path) -> None:
    found = end_to_end.measure(job(tmp_path, rounds=1))
    rows, file = end_to_end.rows(found.readings), tmp_path / "rows.csv"
    for _ in range(2):
        end_to_end.write_csv(file, job(tmp_path), found, rows, "abc")
    held = file.read_text()
    assert len(held.splitlines()) == 1 + 2 * len(rows)
    assert list(rows[0]) == end_to_end.COLUMNS
    # What an arm tells has a column each.
    versions = decode_arm.versions(SimpleNamespace(__name__="vllm", __version__="1"))
    assert end_to_end.csv_columns("vllm")[4:] == ["device", *versions, *rows[0]]
    found.arms["fused"]["versions"] = {"fse_patch": "0", "sglang": "0"}
    with pytest.raises(FsePatchError, match="has other columns"):
        end_to_end.write_csv(file, replace(job(tmp_path), engine="sglang"), found, rows, "abc")
    assert file.read_text() == held


def test_a_run_that_is_cut_has_all_streams(tmp_path: Path) -> None:
    said: list[str] = []
    raw = tmp_path / "raw.json"
    started = time.monotonic()
    cut = job(tmp_path, rounds=500, seconds=4.0, script={"pause": 0.02})
    found = end_to_end.measure(cut, progress=said.append, raw=raw)
    assert time.monotonic() - started < 20
    rows = end_to_end.rows(found.readings)
    assert [row["streams"] for row in rows] == [1, 4]
    assert rows[0]["rounds"] == rows[1]["rounds"] < 500
    assert f"4 s are over: {rows[0]['rounds']} of 500 rounds" in said
    assert len(json.loads(raw.read_text())["readings"]) == rows[0]["rounds"] * 6
    # The first round is taken however long the engines took to start.
    first = end_to_end.measure(job(tmp_path, seconds=0.0))
    assert {row["rounds"] for row in end_to_end.rows(first.readings)} == {1}


@pytest.mark.parametrize("layout", ["paired", "merged"])
def test_an_arm_that_measures_at_its_start_is_alone_by_then(tmp_path: Path, layout: str) -> None:
    came = tmp_path / "came"
    end_to_end.measure(
        job(tmp_path, rounds=1, script={"came": str(came)}), env={**os.environ, "FSE_PATCH_LAYOUT": layout}
    )
    times = {name: (start, ready) for name, start, ready in map(json.loads, came.read_text().splitlines())}
    others = min(times["stock"][0], times["again"][0])
    # The control: merged layers measure nothing, and all arms start at once.
    assert (times["fused"][1] < others) == (layout == "paired")


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize(
    ("fault", "words", "log"),
    [
        ("dies", "ended with status 7", "the last words"),
        ("fails", "RuntimeError: out of memory", "a traceback"),
    ],
)
def test_an_arm_that_ends_takes_the_others_with_it(
    tmp_path: Path, name: str, fault: str, words: str, log: str
) -> None:
    raw = tmp_path / "raw.json"
    with pytest.raises(ArmError, match=f"{name} arm: {words}") as caught:
        end_to_end.measure(job(tmp_path, script={"arm": name, "fault": fault}), raw=raw)
    assert log in caught.value.log
    assert caught.value.exit_status == 2
    assert not any(alive(pid) for pid in {note["pid"] for note in notes(tmp_path)})


def test_a_killed_run_keeps_its_rounds(tmp_path: Path) -> None:
    raw = tmp_path / "raw.json"
    with pytest.raises(ArmError):
        end_to_end.measure(job(tmp_path, script={"arm": "again", "fault": "dies"}, streams=(1,)), raw=raw)
    # Two of its questions warm up and two are a round: the sixth is in the second round.
    assert [r["round"] for r in json.loads(raw.read_text())["readings"]] == [0, 0, 0]


def test_a_silent_arm_is_not_waited_for(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ArmError, match="fused arm: silent for 3 s"):
        end_to_end.measure(job(tmp_path, limit=3.0, script={"arm": "fused", "fault": "silent"}))
    assert time.monotonic() - started < 15
    assert not any(alive(pid) for pid in {note["pid"] for note in notes(tmp_path)})


@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        ("fused", "wrong state", "fused arm: is stock: slower.unmeasured: no table"),
        ("stock", "wrong state", "stock arm: is not stock"),
        ("again", "wrong state", "again arm: is not stock"),
        ("fused", "half", r"fused arm: layers \[0\] are fused, \[0, 1\] were decided"),
    ],
)
def test_an_arm_in_the_wrong_state_ends_the_run(tmp_path: Path, name: str, fault: str, words: str) -> None:
    with pytest.raises(ArmError, match=words):
        end_to_end.measure(job(tmp_path, script={"arm": name, "fault": fault}))
    assert not (tmp_path / "notes").exists()  # nothing was measured


def bench(monkeypatch: pytest.MonkeyPatch, *options: str, gpu: bool = True) -> Any:
    monkeypatch.setattr(guards, "engine_version", lambda book: "0.32.0")
    monkeypatch.setattr(guards, "guard", lambda *_: "")
    # The engine of these tests takes a script as its arguments.
    monkeypatch.setattr(bench_end_to_end, "check_arguments", lambda *_: None)
    monkeypatch.setattr(cli_verify, "decide_roles", decided)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    return CliRunner().invoke(app.app, ["bench", str(SHAPE), *options])


def decided(*_: Any) -> dict[str, Any]:
    main = merged(decide_roles(SHAPE, "vllm")["main"])
    return {"main": replace(main, moe=replace(main.moe, layers=tuple(LAYERS)))}


def test_the_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = json.dumps({"ms": MS, "prompt": 7.0, "notes": str(tmp_path / "notes")})
    files = [f"--csv={tmp_path / 'a.csv'}", f"--raw={tmp_path / 'a.json'}", f"--plot={tmp_path / 'a.png'}"]
    options = [
        "--end-to-end",
        "--streams=2,64",
        "--rounds=5",
        "--commit=abc",
        "--engine-args",
        script,
        "--json",
    ]
    done = bench(monkeypatch, *options, *files)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [row["ratio"] for row in report["rows"]] == pytest.approx([1.5, 1.5])
    with (tmp_path / "a.csv").open(newline="") as file:
        two, many = csv.DictReader(file)
    assert (two["streams"], two["rounds"], two["ratio"], two["again"]) == ("2", "5", "1.5", "1.0")
    assert (many["streams"], many["model"], many["vllm"], many["commit"]) == ("64", SHAPE.name, "0", "abc")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "a.json").read_text())["readings"]) == 5 * 2 * 3


def test_without_a_gpu_no_engine_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "measure", lambda *args, **kwargs: pytest.fail("measured"))
    done = bench(monkeypatch, "--end-to-end", gpu=False)
    assert str(done.exception) == "no CUDA device here; nothing to measure"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sets", "2"], "--sets: not without --end-to-end"),
        (["--end-to-end", "--tokens", "1"], "--tokens: not with --end-to-end"),
        (["--end-to-end", "--streams", "one"], "--streams 'one'"),
        (["--end-to-end", "--engine-args", "[]"], "--engine-args: give a JSON object"),
        (["--end-to-end", "--raw", "/none/a.json"], "there is no such folder"),
        (["--end-to-end", "--csv", "/none/a.csv"], "there is no such folder"),
        (["--end-to-end", "--csv", __file__], "has other columns"),
    ],
)
def test_bad_input_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, options: list[str], words: str) -> None:
    # Said before an engine starts.
    monkeypatch.setattr(end_to_end, "measure", lambda *args, **kwargs: pytest.fail("measured"))
    done = bench(monkeypatch, *options)
    assert isinstance(done.exception, FsePatchError)
    assert words in str(done.exception)


def test_the_picture_shows_the_rows() -> None:
    rows = [
        {"streams": 1, "ratio": 1.5, "lower": 1.4, "again": 1.0},
        {"streams": 2, "ratio": None, "lower": None, "again": None},
        {"streams": 4, "ratio": 1.2, "lower": 1.1, "again": 0.99},
    ]
    (panel,) = draw({"one": rows}, Figure, _streams_panel).axes
    drawn = {line.get_label(): list(map(tuple, line.get_xydata())) for line in panel.get_lines()}
    assert drawn["fused"] == [(1.0, 1.5), (4.0, 1.2)]
    assert drawn["stock again"] == [(1.0, 1.0), (4.0, 0.99)]


def test_a_long_answer_that_takes_no_longer_gives_no_ratio() -> None:
    readings = [{"round": 0, "streams": 1, "arm": name, "ms": 1.0, "different_tokens": 1} for name in ARMS]
    assert end_to_end.rows(readings)[0]["ratio"] == 1.0
    readings[1]["ms"] = 0.0
    row = end_to_end.rows(readings)[0]
    assert (row["ratio"], row["valid"]) == (None, False)
    assert "too short" in end_to_end.line(row)
