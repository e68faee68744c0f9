"""An explanation as plain data: the rule and its number, the evidence of each layer, like layers together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.checkpoint.families import Role
from fse_patch.fusion_core.decision.explain import explain
from fse_patch.fusion_core.decision.policy import DEFAULT_DENY, Policy, Rule
from fse_patch.fusion_core.decision.policy_file import load_policy
from fse_patch.fusion_core.evidence.gather import read_evidence

from .checkpoints import config_of, model_tensors, write_checkpoint
from .golden import ROWS, write_row

POLICY = load_policy()
FP8 = "fp8-block, block 128x128, dynamic activations"
FP8_HEADERS = "weight F8_E4M3 matrix + weight_scale_inv F32 block 128x128"
GPTQ = "int4-gptq, group 128, symmetric, gptq_v2"
GPTQ_HEADERS = "g_idx I32 1-D + qweight I32 2-D + qzeros I32 2-D + scales F16 2-D"


def explained(
    folder: Path, name: str, role: Role = "main", policy: Policy = POLICY, engine: str = "vllm"
) -> dict[str, Any]:
    evidence = read_evidence(write_row(folder, next(row for row in ROWS if row["id"] == name)), "vllm")
    return explain(evidence, engine, role, policy)


def rule(name: str) -> dict[str, Any]:
    """A rule of the default policy, as an explanation has it."""
    number, found = next((n, r) for n, r in enumerate(POLICY.rules, 1) if r.id == name)
    parts = ("id", "fuse", "reason", "why", "source")
    return {"number": number, **{part: getattr(found, part) for part in parts}}


def part(headers: str | None, config: str | None) -> dict[str, Any]:
    both = {"headers": headers, "config": config}
    return {"gate_up": both, "down": both}


def test_layers_that_show_the_same_stand_together(tmp_path: Path) -> None:
    report = explained(tmp_path, "qwen3-next-fp8-one-layer-in-bf16")
    fp8, plain = part(FP8_HEADERS, FP8), part("weight BF16 matrix", "plain")
    agrees = {"finding": "", "config": "agrees", "config_detail": ""}
    assert report == {
        "role": "main",
        "fuse": True,
        "reason": "ok",
        "detail": "2 sparse layers, 1 shared slot each; routed and shared experts alike in "
        "BF16, F32, F8_E4M3 (fp8-block, plain)",
        "rule": rule("fp8"),
        "formats": ["fp8-block", "plain"],
        "quantisation": [{"method": "fp8", "scheme": "block", "source": "config.json: quantization_config"}],
        "layers": [
            {"layers": [0], "rule": "fp8", **agrees, "routed": fp8, "shared": fp8},
            {"layers": [1], "rule": "unquantised", **agrees, "routed": plain, "shared": plain},
        ],
    }


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_mixed_checkpoint_shows_what_is_mixed(tmp_path: Path, engine: str) -> None:
    report = explained(tmp_path, "qwen3.6-35b-gptq-routed-only", engine=engine)
    assert (report["fuse"], report["reason"], report["rule"]) == (False, "quant.mixed", rule("mixed"))
    assert report["layers"] == [
        {
            "layers": [0, 1],
            "rule": "mixed",
            "finding": "quant.mixed",
            "config": "differs",
            "config_detail": f"routed {GPTQ}, shared plain",
            "routed": part(GPTQ_HEADERS, GPTQ),
            "shared": part("weight BF16 matrix", "plain"),
        }
    ]


def test_a_draft_is_explained_by_its_own_layers(tmp_path: Path) -> None:
    report = explained(tmp_path, "qwen3.6-35b-gptq-routed-only", "draft")
    assert (report["role"], report["fuse"], report["rule"]) == ("draft", True, rule("unquantised"))
    assert [group["layers"] for group in report["layers"]] == [[0]]


def test_a_role_that_is_not_there_has_no_rule_and_no_layers(tmp_path: Path) -> None:
    report = explained(tmp_path, "qwen3-next-bf16", "draft")
    assert (report["reason"], report["rule"], report["layers"]) == ("family.unknown", None, [])
    assert report["quantisation"] == [{"method": "none", "scheme": "", "source": "nothing declared"}]


def test_layers_with_findings_stay_apart(tmp_path: Path) -> None:
    report = explained(tmp_path, "qwen1.5-moe-fp8-block-across-slots")
    assert (report["reason"], report["rule"]) == ("width.block", None)
    assert [{k: v for k, v in group.items() if k != "finding"} for group in report["layers"]] == [
        {"layers": [0], "rule": None, "config": None, "config_detail": ""},
        {"layers": [1], "rule": None, "config": None, "config_detail": ""},
    ]
    for number, group in enumerate(report["layers"]):
        assert group["finding"].startswith(f"width.block: layer {number}: gate_up: fp8-block, block 256x256")


def test_the_denial_has_the_number_behind_the_last_rule(tmp_path: Path) -> None:
    first = POLICY.rules[:1]
    report = explained(tmp_path, "qwen3-next-bf16", policy=Policy(first))
    parts = ("id", "fuse", "reason", "why", "source")
    assert report["rule"] == {"number": 2, **{part: getattr(DEFAULT_DENY, part) for part in parts}}
    assert [group["rule"] for group in report["layers"]] == [DEFAULT_DENY.id]


def test_a_layer_without_specs_or_claims_has_none_of_them(tmp_path: Path) -> None:
    evidence = read_evidence(
        write_checkpoint(tmp_path, config_of("qwen3_next"), model_tensors("qwen3_next")), "vllm"
    )
    main = evidence.roles["main"]
    agreement = main.layers[0].config
    assert agreement is not None
    unknown = dataclasses.replace(agreement, state="unknown", detail="not understood", routed=None)
    layers = (dataclasses.replace(main.layers[0], shared=None, config=unknown), *main.layers[1:])
    changed = dataclasses.replace(evidence, roles={"main": dataclasses.replace(main, layers=layers)})
    first, second = explain(changed, "vllm", "main", POLICY)["layers"]
    assert (first["layers"], first["config"], first["config_detail"]) == ([0], "unknown", "not understood")
    assert first["routed"] == part("weight BF16 matrix", None)
    assert first["shared"] == part(None, "plain")
    assert second["layers"] == [1]
    # No claim at all is what a layer with a finding has, with no words of one.
    bare = (dataclasses.replace(main.layers[0], config=None),)
    changed = dataclasses.replace(evidence, roles={"main": dataclasses.replace(main, layers=bare)})
    assert explain(changed, "vllm", "main", POLICY)["layers"] == [
        {"layers": [0], "rule": None, "finding": "", "config": None, "config_detail": ""}
    ]


def test_rules_see_the_engine_and_the_role(tmp_path: Path) -> None:
    parts = {"fuse": False, "reason": "disabled", "why": "w", "source": "s"}
    mine = [
        Rule.model_validate({"id": "not-there", "when": {"engines": ["sglang"]}, **parts}),
        Rule.model_validate({"id": "no-draft", "when": {"roles": ["draft"]}, **parts}),
    ]
    policy = Policy((*mine, *POLICY.rules))
    name = "qwen3.6-35b-gptq-routed-only"
    for number, (engine, role, fired) in enumerate(
        [("sglang", "main", "not-there"), ("vllm", "draft", "no-draft"), ("vllm", "main", "mixed")]
    ):
        report = explained(
            tmp_path / str(number), name, "draft" if role == "draft" else "main", policy, engine
        )
        assert {group["rule"] for group in report["layers"]} == {fired} == {report["rule"]["id"]}


def test_an_unknown_family_has_no_layers(tmp_path: Path) -> None:
    evidence = read_evidence(write_checkpoint(tmp_path, {"model_type": "llama"}, None), "vllm")
    report = explain(evidence, "vllm", "main", POLICY)
    assert (report["reason"], report["rule"], report["layers"]) == ("family.unknown", None, [])
    with pytest.raises(FsePatchError, match="unknown engine 'other'"):
        explain(evidence, "other", "main", POLICY)
