"""Plans of modes, tuned tables, and the gates that become one matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.forward import tuned
from fse_patch.fusion_core.forward.gate_rows import GateRows
from fse_patch.fusion_core.forward.plan import ModePlan, always
from fse_patch.fusion_core.forward.tuned import Situation, Split, plan_for, shipped, split_places

PLACE: dict[str, Any] = {
    "num_routed": 512, "num_shared_slots": 1, "top_k": 10, "hidden_size": 2048, "width": 512,
    "dtype": "bfloat16", "scoring": "softmax", "gated": True,
}  # fmt: skip
HEAD = {"engine": "vllm", "release": "9.9.9", "backend": "triton", "device": "Some GPU"}
HERE = Situation(**HEAD, **PLACE)


def table(path: Path, **row: Any) -> Path:
    rows = [{**PLACE, "steps": [{"up_to": 4, "mode": "small"}], "otherwise": "split", **row}]
    path.write_text(yaml.safe_dump({**HEAD, "versions": {}, "measured": "test", "rows": rows}))
    return path


def test_a_step_holds_up_to_its_limit() -> None:
    plan = ModePlan(((2, "small"), (8, "fused")), "split", "test")
    assert [plan.mode_of(n) for n in (1, 2, 3, 8, 9, 4096)] == ["small"] * 2 + ["fused"] * 2 + ["split"] * 2
    assert plan.modes == {"small", "fused", "split"}
    assert str(plan) == "small up to 2, fused up to 8, split beyond"
    assert str(always("fused", "test")) == "fused always"


@pytest.mark.parametrize("steps", [((4, "small"), (2, "fused")), ((0, "small"),), ((1, "tiny"),)])
def test_plans_that_are_none(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"limits|no mode"):
        ModePlan(steps, "split", "test")


def test_a_table_is_for_one_situation(tmp_path: Path) -> None:
    user_table = table(tmp_path / "own.yaml")
    plan = plan_for(HERE, "cuda", user_table)
    assert isinstance(plan, ModePlan)
    assert (plan.mode_of(4), plan.mode_of(5)) == ("small", "split")
    others: list[dict[str, Any]] = [
        {"device": "Other GPU"}, {"release": "9.9.8"}, {"backend": "x"}, {"width": 256},
        {"dtype": "float16"}, {"engine": "sglang"}, {"num_shared_slots": 2},
        {"gated": False}, {"quant": "fp8-block 128x128"},
    ]  # fmt: skip
    for other in others:
        assert plan_for(replace(HERE, **other), "cuda", user_table) is None, other


def test_a_table_of_quantised_experts_is_for_no_others(tmp_path: Path) -> None:
    user_table = table(tmp_path / "own.yaml", quant="fp8-block 128x128")
    assert isinstance(plan_for(replace(HERE, quant="fp8-block 128x128"), "cuda", user_table), ModePlan)
    assert plan_for(HERE, "cuda", user_table) is None
    assert plan_for(replace(HERE, quant="fp8-block 64x128"), "cuda", user_table) is None


def test_slower_everywhere_or_somewhere_is_no_plan(tmp_path: Path) -> None:
    assert plan_for(HERE, "cuda", table(tmp_path / "a.yaml", otherwise="slower")) == "slower"
    steps = [{"up_to": 1, "mode": "small"}, {"up_to": 2, "mode": "slower"}]
    assert plan_for(HERE, "cuda", table(tmp_path / "b.yaml", steps=steps)) == "slower"


@pytest.mark.parametrize("place", split_places(), ids=lambda place: f"{place.engine}-{place.backend}")
def test_without_a_table_split_stands_in_where_it_is_stock(place: Split) -> None:
    known = replace(
        HERE,
        engine=place.engine,
        release=place.releases[0],
        backend=place.backend,
        quant=place.quants[0],
        device=(place.devices or [HERE.device])[0],
        width=768,
    )
    plan = plan_for(known, "cuda")
    assert isinstance(plan, ModePlan)
    assert plan.modes == {"split"}
    assert plan_for(known, "cuda", places=[place]) == plan
    assert plan_for(known, "cuda", places=()) is None
    # The controls: anything else than the place is refused.
    assert plan_for(known, "rocm") is None
    assert plan_for(replace(known, num_shared_slots=2), "cuda") is None
    assert plan_for(replace(known, dtype="float32"), "cuda") is None
    assert plan_for(replace(known, backend="flashinfer_cutlass"), "cuda") is None
    assert plan_for(replace(known, release="0.25.9"), "cuda") is None
    other = "none" if known.quant != "none" else "fp8-block 128x128"
    assert plan_for(replace(known, quant=other), "cuda") is None
    if place.devices is not None:
        assert plan_for(replace(known, device="NVIDIA B200"), "cuda") is None


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"steps": [{"up_to": 4, "mode": "tiny"}]}, "steps.0.mode"),
        ({"steps": [{"up_to": 4, "mode": "small"}, {"up_to": 4, "mode": "fused"}]}, "ascending"),
        ({"extra": 1}, "extra"),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, row: Any, words: str) -> None:
    with pytest.raises(FsePatchError, match=words):
        plan_for(HERE, "cuda", table(tmp_path / "own.yaml", **row))
    with pytest.raises(FsePatchError, match="missing"):
        plan_for(HERE, "cuda", tmp_path / "missing.yaml")


def test_a_table_that_was_written_by_hand_is_read(tmp_path: Path) -> None:
    steps = [{"up_to": 4.0, "mode": "small"}]
    plan = plan_for(HERE, "cuda", table(tmp_path / "mine.yaml", gated=1, steps=steps))
    assert isinstance(plan, ModePlan)
    assert [plan.mode_of(n) for n in (4, 5)] == ["small", "split"]


def test_shipped_tables_can_be_read_and_name_each_shape_once() -> None:
    for name, found in shipped():
        keys = [tuple(row.key.values()) for row in found.rows]
        assert len(keys) == len(set(keys)), name


@pytest.mark.parametrize(
    ("file", "backend", "shape"),
    [
        ("nvidia_h200_sglang.yaml", "triton", {"num_routed": 256, "top_k": 8}),
        ("nvidia_h200_sglang_native.yaml", "triton, fused natively", {"num_routed": 512, "top_k": 10}),
    ],
)
def test_sglang_runs_by_the_table_that_is_shipped(file: str, backend: str, shape: dict[str, Any]) -> None:
    engine = {"engine": "sglang", "release": "0.5.17", "backend": backend, "device": "NVIDIA H200"}
    here = Situation(**{**engine, **PLACE, **shape})
    plan = plan_for(here, "cuda", places=())
    assert isinstance(plan, ModePlan)
    assert plan.source == f"table {file}"
    assert (plan.mode_of(1), plan.mode_of(8192)) == ("small", "split")
    # The controls: another release, device and backend.
    for other in ({"release": "0.5.18"}, {"device": "NVIDIA H100"}, {"backend": "deep_gemm"}):
        assert plan_for(replace(here, **other), "cuda", places=()) is None, other


def test_a_situation_is_said_in_a_line() -> None:
    layout = ExpertLayout(512, 1, 10, 2048, 1024)
    kinds = {"dtype": "bfloat16", "scoring": "softmax", "gated": True}
    here = Situation.of(layout, 2, **HEAD, **kinds)
    assert here == HERE
    assert str(here) == (
        "vllm 9.9.9 (triton) on Some GPU: bfloat16, softmax, gated, E=512+1, k=10, H=2048, I=512"
    )
    other = replace(here, quant="fp8-block 128x128", gated=False, scoring="sigmoid")
    assert str(other) == (
        "vllm 9.9.9 (triton) on Some GPU: bfloat16 with fp8-block 128x128, sigmoid, "
        "E=512+1, k=10, H=2048, I=512"
    )


def test_a_malformed_allow_list_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "execution.yaml"
    file.write_text("split: [{engine: vllm}]")
    monkeypatch.setattr(tuned, "EXECUTION_FILE", file)
    split_places.cache_clear()
    with pytest.raises(FsePatchError) as error:
        split_places()
    assert str(error.value) == f"{file}: split.0.releases: Field required"


class Gate(torch.nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(rows, 16), requires_grad=False)


def test_gates_share_one_matrix() -> None:
    gate, shared = Gate(12), Gate(1)
    both = torch.cat([gate.weight.data, shared.weight.data]).clone()
    rows = GateRows([gate, shared])
    assert torch.equal(rows.rows, both)
    assert rows.padded.shape == (16, 16)
    assert not rows.padded[13:].any()
    address = rows.padded.data_ptr()
    # What is loaded into a module is in the matrix at once.
    shared.weight.data.fill_(3)
    assert rows.rows[12].eq(3).all()
    # New memory or a new parameter shows after a refresh, at the same address.
    gate.weight.data = torch.full((12, 16), 5.0)
    assert not rows.rows[:12].eq(5).any()
    shared.weight = torch.nn.Parameter(torch.full((1, 16), 7.0), requires_grad=False)
    assert rows.refresh()
    assert rows.rows[:12].eq(5).all()
    assert rows.rows[12].eq(7).all()
    assert rows.padded.data_ptr() == address
    assert not rows.refresh()


def test_gates_of_two_dtypes_are_not_put_together() -> None:
    with pytest.raises(ValueError, match="dtype"):
        GateRows([Gate(12), Gate(1).half()])
