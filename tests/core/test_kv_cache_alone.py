"""Checkpoints whose KV cache alone is quantised: as plain ones to everything behind the decision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fse_patch import settings
from fse_patch.adapters.refusals import quantised_online, without_proof
from fse_patch.fusion_core.checkpoint.config import UNQUANTISED
from fse_patch.fusion_core.decision.decide import decide, decide_roles
from fse_patch.fusion_core.decision.explain import explain
from fse_patch.fusion_core.decision.outcome import Merged
from fse_patch.fusion_core.decision.policy_file import load_policy
from fse_patch.fusion_core.decision.proven import proven_platforms
from fse_patch.fusion_core.evidence.gather import read_evidence
from fse_patch.fusion_core.proof.checkpoint_layer import CheckpointLayer
from fse_patch.fusion_core.quant.claims import all_plain

from .checkpoints import tensors_of
from .golden import ROWS, write_row
from .moe import naming_of, stored_as
from .outcomes import merged

BUILT = SimpleNamespace()
# Rows that declare something and are plain all the same, with the method that they name.
ALONE = [
    row
    for row in ROWS
    if row["expect"]["rule"].startswith("unquantised")
    and ("quantization" in row or "modelopt" in row)
    and row["expect"]["reason"] == "ok"
    and "attention-only" not in row["id"]
]


def declared(row: dict[str, Any]) -> str:
    if row.get("quantization") == {}:
        return UNQUANTISED
    return str(row.get("quantization", {}).get("quant_method", "modelopt"))


def named(name: str) -> dict[str, Any]:
    return next(row for row in ROWS if row["id"] == name)


@pytest.mark.parametrize("row", ALONE, ids=lambda row: row["id"])
def test_what_is_behind_the_decision_sees_a_plain_checkpoint(
    tmp_path: Path, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FSE_PATCH_ALLOW_UNPROVEN", raising=False)
    decision = merged(decide(write_row(tmp_path, row), "vllm"))
    assert (decision.quant_method, decision.read_as) == (UNQUANTISED, declared(row))
    assert decision.formats == ("plain",)
    assert not decision.packed
    assert proven_platforms(decision) == ["cpu", "cuda"]
    assert list(without_proof(decision, "cuda", settings.load())) == []
    if declared(row) == UNQUANTISED:
        return
    # The engine names the checkpoint's own method, and has built its code for the cache; or nothing at all.
    assert list(quantised_online(decision, declared(row), BUILT)) == []
    assert list(quantised_online(decision, None, None)) == []
    (reason,) = quantised_online(decision, "fp8", BUILT)
    assert reason.code == "quant.online"


def test_there_are_such_rows_of_every_kind() -> None:
    assert len(ALONE) >= 8
    assert {declared(row) for row in ALONE} == {UNQUANTISED, "compressed-tensors", "modelopt"}


def test_layers_left_plain_by_a_quantised_checkpoint_are_another_matter(tmp_path: Path) -> None:
    decision = merged(decide(write_row(tmp_path, named("qwen3.5-fp8-attention-only")), "vllm"))
    assert (decision.quant_method, decision.read_as, decision.formats) == ("fp8", "fp8", ("plain",))
    assert proven_platforms(decision) == []


def test_the_canary_reads_plain_weights(tmp_path: Path) -> None:
    row = named("qwen3-next-kv-cache-alone-no-groups")
    decision = merged(decide(write_row(tmp_path, row), "vllm"))
    naming = naming_of(decision.model_type, 2)
    for method in (decision.quant_method, decision.read_as):
        layer = CheckpointLayer(tensors_of(tmp_path), naming, "main", method, 0)
        assert layer.resolve is all_plain


def test_an_explanation_names_what_is_declared(tmp_path: Path) -> None:
    evidence = read_evidence(write_row(tmp_path, named("qwen3-next-kv-cache-alone-no-groups")), "vllm")
    told = explain(evidence, "sglang", "main", load_policy())
    assert [q["method"] for q in told["quantisation"]] == ["compressed-tensors"]
    assert (told["fuse"], {group["rule"] for group in told["layers"]}) == (True, {"unquantised"})


CACHE = replace(stored_as("none", ("plain",)), read_as="compressed-tensors")
FP4 = replace(stored_as("modelopt", ("plain",)), read_as="modelopt-fp4")


@pytest.mark.parametrize(
    ("decision", "running", "built", "refused"),
    [
        (CACHE, "compressed_tensors", BUILT, False),
        (CACHE, "Compressed-Tensors", BUILT, False),
        (CACHE, None, None, False),
        (CACHE, "unquant", None, False),
        (CACHE, None, BUILT, True),
        (CACHE, "unquant", BUILT, True),
        (CACHE, "fp8", BUILT, True),
        (CACHE, "modelopt", BUILT, True),
        # What nothing declares is read by nobody.
        (replace(CACHE, read_as=""), "compressed-tensors", BUILT, True),
        (replace(CACHE, read_as="unnamed"), "unnamed", BUILT, False),
        # Engines have code of its own for ModelOpt's FP4, under the same method in config.json.
        (FP4, "modelopt_fp4", BUILT, False),
        (FP4, "modelopt", BUILT, True),
        (replace(FP4, read_as="modelopt"), "modelopt_fp4", BUILT, True),
        (replace(FP4, read_as=""), "modelopt_fp4", BUILT, True),
    ],
)
def test_a_checkpoints_own_reader_quantises_nothing_on_the_fly(
    decision: Merged, running: str | None, built: object, refused: bool
) -> None:
    assert [reason.code for reason in quantised_online(decision, running, built)] == [
        "quant.online"
    ] * refused


def test_what_vllm_quantises_beside_the_checkpoints_own_way_is_refused() -> None:
    beside = SimpleNamespace(online_quantization_config=SimpleNamespace())
    without = SimpleNamespace(online_quantization_config=None)
    for decision, running in ((CACHE, "compressed-tensors"), (FP4, "modelopt_fp4")):
        assert list(quantised_online(decision, running, without)) == []
        (reason,) = quantised_online(decision, running, beside)
        assert "on the fly" in reason.detail
    # It leaves alone what the checkpoint quantises itself.
    assert list(quantised_online(stored_as("fp8", ("fp8-block",)), "fp8", beside)) == []


@pytest.mark.parametrize("name", ["qwen3.5-122b-nvfp4-shared-in-bf16", "qwen3.6-35b-nvfp4-draft-in-bf16"])
def test_a_plain_draft_of_an_nvfp4_checkpoint(tmp_path: Path, name: str) -> None:
    row = named(name)
    roles = decide_roles(write_row(tmp_path, row), "sglang")
    assert not isinstance(roles["main"], Merged)
    draft = merged(roles["draft"])
    assert (draft.formats, draft.rule, draft.packed) == (("plain",), "unquantised", False)
    running = "modelopt_fp4" if draft.quant_method == "modelopt" else "compressed-tensors"
    assert list(quantised_online(draft, running, BUILT)) == []
    assert list(quantised_online(draft, "nvfp4_online", BUILT)) != []
