"""`fse-patch bench --end-to-end` with three live engines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fse_patch.fusion_core.decision.decide import decide_roles
from fse_patch.fusion_core.decision.outcome import Merged
from fse_patch.lab import end_to_end, readings
from fse_patch.lab.live_arms import ARMS

from ..running import VOCAB, Checkpoints

pytestmark = [pytest.mark.one_release, pytest.mark.long]


def test_three_live_engines_share_sets_of_experts(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path, "sglang").path("glm4_moe_shared2_scale")
    decision = decide_roles(folder, "sglang")["main"]
    assert isinstance(decision, Merged)
    layers = decision.moe.layers
    assert len(layers) > 1  # otherwise nothing could be shared
    job = end_to_end.Job(
        folder,
        "sglang",
        layers,
        VOCAB,
        streams=(1, 2),
        rounds=2,
        sets=1,
        engine_args={"dtype": "float32"},
        limit=240.0,
        lengths=readings.Lengths(33, 65, 65, 2, repeats=1),
    )
    found = end_to_end.measure(job, os.environ, raw=tmp_path / "raw.json")
    assert [(row["streams"], row["rounds"]) for row in end_to_end.rows(found.readings)] == [(1, 2), (2, 2)]
    # The last 32 steps of an answer of 65 tokens.
    for reading in found.readings:
        assert all(0 < tail < long for tail, long in zip(reading["tail"], reading["long"], strict=True))
        assert not reading["short"]
    for name in ARMS:
        assert found.arms[name]["shared"] == {"layers": len(layers), "sets": 1}
        # In processes that SGLang spawned, and that the parent did not start.
        assert found.reports[name]["pid"] != os.getpid()
    assert len({found.reports[name]["pid"] for name in ARMS}) == 3
    assert [found.reports[name]["roles"] for name in ("stock", "again")] == [[], []]
    (role,) = found.reports["fused"]["roles"]
    assert role["fused_layers"] == list(layers)
    assert role["calls_by_mode"]["fused"] > 0
