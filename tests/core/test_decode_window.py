"""The window of `fse-patch profile`: it waits for all streams, warm; it tells what falls in; its table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fse_patch.errors import FsePatchError  # noqa: E402
from fse_patch.lab import profile, profile_arm  # noqa: E402
from fse_patch.lab.decode_window import DecodeWindow, table  # noqa: E402


def steps(window: DecodeWindow, decoding: list[int]) -> list[str]:
    """The state during each step."""
    states = []
    for count in decoding:
        window.step(count)
        states.append(window.state)
    return states


@pytest.mark.parametrize(
    ("decoding", "opens"),
    [
        ([2, 2, 2, 2, 2], 2),
        ([0, 2, 2, 2, 2, 2], 3),  # a prompt
        ([1, 2, 2, 2, 2, 2], 3),  # a stream that has not come yet
        ([2, 2, 0, 2, 2, 2, 2, 2], 5),  # a prompt between: it warms up again
        ([2, 2, 1, 2, 2, 2, 2, 2], 5),
    ],
)
def test_it_waits_for_all_streams_and_warm_steps(decoding: list[int], opens: int) -> None:
    window = DecodeWindow(2, 2, 2, "outside")
    states = steps(window, decoding)
    assert states == ["waiting"] * opens + ["open"] * 2 + ["closed"] * (len(decoding) - opens - 2)
    assert window.seen == 2


def test_without_warm_up_it_opens_at_once() -> None:
    assert steps(DecodeWindow(1, 0, 1, "outside"), [1, 1, 1]) == ["open", "closed", "closed"]


@pytest.mark.parametrize("other", [0, 1, 3])
def test_what_falls_into_the_window_is_told(other: int) -> None:
    window = DecodeWindow(2, 0, 3, "outside")
    steps(window, [2])
    with pytest.raises(FsePatchError, match=f"step 2 of the window has {other} of 2 streams"):
        window.step(other)
    assert window.state == "closed"


class Worker:
    """An engine's, whose step multiplies matrices: more of them in prompts."""

    def step(self, given: int) -> int:
        for _ in range(3 if given else 50):
            torch.ones(64, 64) @ torch.ones(64, 64)
        return given


def watched(asked: dict[str, Any], decoding: list[int]) -> dict[str, Any]:
    worker = Worker()
    profile_arm.watch(worker, "step", lambda given: given, asked)
    assert [worker.step(count) for count in decoding] == decoding
    return profile_arm.told(worker)


def test_the_table_has_the_steps_of_the_window_alone() -> None:
    asked = {"streams": 1, "warm_up": 2, "steps": 4, "looker": "torch"}
    found = watched(asked, [0, 1, 1, 1, 1, 1, 1, 0, 1])
    calls = {row["name"]: row["calls"] for row in found["rows"]}
    assert found["steps"] == 4
    assert calls["aten::mm"] == 4 * 3
    seconds = [row["seconds"] for row in found["rows"]]
    assert seconds == sorted(seconds, reverse=True)
    assert all(each > 0 for each in seconds)


def test_an_end_inside_the_window_ends_it() -> None:
    found = watched({"streams": 1, "warm_up": 0, "steps": 9, "looker": "torch"}, [1, 1])
    assert found["steps"] == 2


def test_a_window_that_never_opened_is_an_error() -> None:
    with pytest.raises(FsePatchError, match="2 streams never decoded together for 1 steps"):
        watched({"streams": 2, "warm_up": 1, "steps": 1, "looker": "torch"}, [1, 1, 1])


def event(name: str, kind: str, microseconds: float) -> Any:
    return SimpleNamespace(
        key=name,
        count=2,
        device_type=SimpleNamespace(name=kind),
        self_cpu_time_total=microseconds,
        self_device_time_total=microseconds,
    )


def test_on_a_device_kernels_count_and_nothing_else() -> None:
    found = table([event("aten::mm", "CPU", 9), event("slow", "CUDA", 5), event("slower", "CUDA", 7)])
    assert [(row.name, row.seconds) for row in found] == [("slower", 7e-6), ("slow", 5e-6)]


def test_arms_stand_beside_each_other() -> None:
    def told(*rows: tuple[str, int, float]) -> dict[str, Any]:
        return {"steps": 2, "rows": [{"name": n, "calls": c, "seconds": s} for n, c, s in rows]}

    rows = profile.beside({"stock": told(("a", 4, 0.002), ("b", 2, 0.004)), "ours": told(("a", 4, 0.006))})
    assert rows == [
        {"name": "a", "stock_ms": 1.0, "stock_calls": 2.0, "ours_ms": 3.0, "ours_calls": 2.0},
        {"name": "b", "stock_ms": 2.0, "stock_calls": 1.0, "ours_ms": 0.0, "ours_calls": 0.0},
    ]
    lines = profile.lines(rows, ("stock", "ours"), 1)
    assert [line.split()[-1] for line in lines] == ["step", "a", "more", "all"]
    assert lines[-1].split()[:2] == ["3.0000", "3.0000"]
