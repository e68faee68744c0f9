"""What `fse-patch compare` says of its figures: rows, verdicts, answers, files, page, time left."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from fse_patch.errors import FsePatchError
from fse_patch.lab.compare import client, files, page, table
from fse_patch.lab.compare.answers import LEAST_16_BIT, Answers, agreement
from fse_patch.lab.compare.steps import Steps, phase_of
from fse_patch.lab.plots import _servers_panel, draw


def level(speed: float) -> client.Level:
    return {**dict.fromkeys(client.KEPT.values(), 1.0), "tokens_per_second": speed}


def row(stock: float, fused: float, again: float) -> table.Row:
    return table.rows({4: level(stock)}, {4: level(fused)}, {4: level(again)})[0]


def report(name: str = "a model", **more: Any) -> dict[str, Any]:
    stock = {1: level(100), 8: level(500), 64: level(2000)}
    fused = {1: level(135), 8: level(505), 64: level(1500)}
    again = {1: level(101), 8: level(480), 64: level(2010)}
    rows = table.rows(stock, fused, again)
    answers = agreement(answers_of(0), answers_of(1e-7), answers_of(0), float32=True)
    return {
        "model": name,
        "rows": rows,
        "speed": table.sentence(rows),
        "answers_words": str(answers),
        "answers": answers.to_dict(),
        "servers": [{"name": "fused", "said": ["rank 0: fused, merged"]}],
        "facts": {"command": "vllm serve a && b"},
        **more,
    }


def answers_of(shift: float, alone: float = 0.0) -> Answers:
    one = [[-1.0 + shift, -2.0], [-3.0]]
    return Answers(one, [[value + alone for value in values] for values in one])


@pytest.mark.parametrize(
    ("speeds", "verdict"),
    [
        ((100, 130, 101), table.FASTER),
        ((100, 70, 101), table.SLOWER),
        ((100, 101, 102), table.SAME),
        # Faster than both, and by less than they differ: says nothing.
        ((200, 335, 317), table.SAME),
        ((100, 60, 130), table.SLOWER),
        ((100, 90, 130), table.SAME),
    ],
)
def test_a_verdict_is_more_than_stock_moves_by_itself(
    speeds: tuple[float, float, float], verdict: str
) -> None:
    found = row(*speeds)
    assert found["verdict"] == verdict
    assert found["lower"] <= found["ratio"] <= found["upper"]
    assert found["ratio"] == pytest.approx(speeds[1] / ((speeds[0] + speeds[2]) / 2))


def test_what_took_no_time_says_nothing() -> None:
    """Beside the verdict of the same speeds, measured for longer."""
    brief = {**level(130), "seconds": 0.9 * table.LEAST_SECONDS}
    held = {
        seconds: table.rows({4: level(100)}, {4: fused}, {4: level(101)})
        for seconds, fused in (("brief", brief), ("long", level(130)))
    }
    assert [held[which][0]["verdict"] for which in ("brief", "long")] == [table.BRIEF, table.FASTER]
    assert table.sentence(held["brief"]) == "fused is measured for too short a time at 4 streams (1.29x)"
    assert "too short a time" in page.page({**report(), "rows": held["brief"]})


def test_the_sentence_has_every_row_once() -> None:
    assert report()["speed"] == (
        "fused is faster at 1 stream (1.34x); slower at 64 streams (0.75x); "
        "as fast as stock within the noise at 8 streams (1.03x)"
    )


def test_answers_are_held_against_stocks_own_noise() -> None:
    quiet = answers_of(0)
    assert agreement(quiet, answers_of(1e-6), quiet, float32=True).holds
    # The controls: a wrong weight, and NaN, do not agree, in float32 and in 16 bit.
    assert not agreement(quiet, answers_of(1e-3), quiet, float32=True).holds
    assert not agreement(quiet, answers_of(math.nan), quiet, float32=True).holds
    assert agreement(quiet, answers_of(LEAST_16_BIT), quiet, float32=False).holds
    assert not agreement(quiet, answers_of(0.2), quiet, float32=False).holds
    assert "DO NOT agree" in str(agreement(quiet, answers_of(0.2), quiet, float32=False))
    # Noise of either kind makes the limit wider.
    for noisy in ((answers_of(0, alone=0.2), quiet), (quiet, answers_of(0.4))):
        assert agreement(noisy[0], answers_of(0.2), noisy[1], float32=False).holds
    with pytest.raises(FsePatchError, match="same tokens"):
        agreement(quiet, Answers([[-1.0]], [[-1.0]]), quiet, float32=True)


def test_all_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = files.write(tmp_path / "out", report(), picture=True)
    assert sorted(path.name for path in made) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {path.suffix for path in made} == {".csv", ".html", ".json", ".png"}
    assert json.loads((tmp_path / "out" / files.JSON).read_text())["model"] == "a model"
    with (tmp_path / "out" / files.CSV).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [line["streams"] for line in rows] == ["1", "8", "64"]
    assert float(rows[0]["ratio"]) == pytest.approx(report()["rows"][0]["ratio"], abs=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def ends(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "page", ends)
    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "other", report(), picture=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FsePatchError, match="is there already"):
        files.check(tmp_path / "out")
    with pytest.raises(FsePatchError, match="there is no folder"):
        files.check(tmp_path / "none" / "out")


class Elements(HTMLParser):
    """Elements that are open, and everything that a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.problems: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(tag)


def test_the_page_is_whole_and_needs_nothing() -> None:
    text = page.page(report("<script>alert(1)</script>"))
    elements = Elements(text)
    assert (elements.open, elements.problems, elements.loads) == ([], [], [])
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "vllm serve a &amp;&amp; b" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    for found in report()["rows"]:
        assert f"{found['ratio']:.2f}" in text
    assert len(re.findall('class="bar"', text)) == 3
    # The control: an element that is not closed is seen.
    assert Elements(text.replace("</h1>", "", 1)).problems


def test_the_page_says_that_answers_differ() -> None:
    differ = agreement(answers_of(0), answers_of(0.2), answers_of(0), float32=True)
    text = page.page(report(answers=differ.to_dict(), answers_words=str(differ)))
    assert '<p class="verdict slower">Answers DO NOT agree' in text
    assert '<p class="verdict faster">Answers agree' in page.page(report())


def test_the_picture_shows_the_rows() -> None:
    rows = report()["rows"]
    (panel,) = draw({"a model": rows}, Figure, _servers_panel).axes
    drawn = {line.get_label(): list(map(float, line.get_ydata())) for line in panel.get_lines()}
    assert drawn["fused"] == [found["ratio"] for found in rows]
    assert drawn["stock again"] == [found["again"] for found in rows]


class Shown:
    def __init__(self) -> None:
        self.lines: list[tuple[int, int, str, float | None]] = []

    def begin(self, number: int, total: int, words: str, left: float | None) -> None:
        self.lines.append((number, total, words, left))


def test_time_left_is_that_of_the_first_arm() -> None:
    now, shown = [0.0], Shown()
    steps = Steps(("stock", "fused"), (1, 2), shown, lambda: now[0])
    for arm, seconds in (("stock", (60, 2, 10, 20)), ("fused", (60, 2, 10, 20))):
        phases = ("starting", "checking answers", phase_of(1), phase_of(2))
        for phase, taken in zip(phases, seconds, strict=True):
            with steps.step(arm, phase):
                now[0] += taken
    assert [line[:3] for line in shown.lines[:3]] == [
        (1, 8, "stock: starting"),
        (2, 8, "stock: checking answers"),
        (3, 8, "stock: 1 stream"),
    ]
    # Nothing is known before the first figure; then the last one stands in; then the first arm says it.
    assert [line[3] for line in shown.lines] == [None, None, None, 10 + 60 + 2 + 10 + 10, 92, 32, 30, 20]
    assert steps.left() == 0
    with pytest.raises(ZeroDivisionError), Steps(("a",), (1,), shown).step("a", "starting"):
        _ = 1 / 0


MEASURED = dict.fromkeys(client.KEPT, 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({"completed": 3, **MEASURED}), "1 of 4 requests failed$"),
        (
            json.dumps(
                {"completed": 2, "errors": ["", "Traceback\n  File\nOSError: gone\n", "x"], **MEASURED}
            ),
            "2 of 4 requests failed: OSError: gone$",
        ),
        ('{"completed": 4}', "cannot be read: KeyError"),
        ("[1", "cannot be read: JSONDecodeError"),
        ('{"completed": null}', "cannot be read"),
    ],
)
def test_a_result_that_is_not_whole_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(FsePatchError, match=words):
        client.read(tmp_path / "r.json", "vllm bench client, 2 streams", 4)


def test_a_whole_result(tmp_path: Path) -> None:
    told = {"completed": 4, **{name: float(number) for number, name in enumerate(client.KEPT)}, "other": "x"}
    (tmp_path / "r.json").write_text(json.dumps(told))
    found = client.read(tmp_path / "r.json", "client", 4)
    assert list(found.values()) == [0.0, 1.0, 2.0, 3.0, 4.0]
