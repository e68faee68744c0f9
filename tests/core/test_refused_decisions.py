"""What a refusal says and keeps, and what rules are told of slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision.decide import decide, decide_evidence
from fse_patch.fusion_core.decision.policy import Policy, Rule
from fse_patch.fusion_core.decision.policy_file import load_policy
from fse_patch.fusion_core.decision.storage import layer_facts, weight_quantisation
from fse_patch.fusion_core.evidence.gather import read_evidence
from fse_patch.fusion_core.reasons import Reason

from .checkpoints import config_of, model_tensors, write_checkpoint
from .outcomes import code, merged, stock
from .test_policy import NVFP4

KNOWN = (
    "it knows glm4_moe, glm4_moe_lite, glm4v_moe, glm4v_moe_text, qwen2_moe, qwen3_5_moe, qwen3_5_moe_text, "
    "qwen3_next, qwen4_exp, qwen4_exp_text"
)
NO_DRAFT = "neither config.json nor the tensors show an MTP draft"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llama"},
         Reason("family.unknown", f"model_type 'llama' is of no family that fse_patch knows; {KNOWN}")),
        ({}, Reason("family.unknown", f"no model_type is of no family that fse_patch knows; {KNOWN}")),
        (config_of("qwen2_moe", num_experts=0),
         Reason("family.unknown", "config.json describes no layer with routed experts")),
        (config_of("qwen2_moe", mlp_only_layers=[0, 1]),
         Reason("family.unknown", "config.json describes no layer with routed experts")),
        (config_of("glm4_moe", n_shared_experts=0),
         Reason("shared.absent", "the shared expert has width 0: there is nothing to fuse")),
        (config_of("qwen2_moe", shared_expert_intermediate_size=48),
         Reason("width.mismatch", "the shared expert's width 48 is no multiple of the routed width 32")),
        (config_of("qwen2_moe", hidden_act="gelu"),
         Reason("activation.differs", "hidden_act is 'gelu'; only 'silu' is proven to fuse")),
        # Values of a checkpoint leave it one line.
        (config_of("qwen2_moe", hidden_act="ge\n  lu"),
         Reason("activation.differs", r"hidden_act is 'ge\n lu'; only 'silu' is proven to fuse")),
    ],
)  # fmt: skip
def test_the_words_of_what_config_json_alone_forbids(
    tmp_path: Path, config: dict[str, Any], reason: Reason
) -> None:
    assert stock(decide(write_checkpoint(tmp_path, config, None), "vllm")).reason == reason


def test_a_refusal_keeps_what_the_checkpoint_is(tmp_path: Path) -> None:
    config = config_of("glm4_moe", n_shared_experts=2, quantization_config=NVFP4)
    folder = write_checkpoint(tmp_path, config, model_tensors("glm4_moe", slots=2))
    refused = stock(decide(folder, "vllm"))
    plain = write_checkpoint(tmp_path / "plain", config_of("glm4_moe", n_shared_experts=2), None)
    fused = merged(decide(plain, "vllm"))
    assert refused.moe == fused.moe
    assert (refused.moe_layers, refused.stored_layers) == ((1, 2), (1, 2))
    assert (refused.layout, refused.routing) == (fused.moe.layout, fused.moe.routing)
    assert refused.config == fused.config
    assert refused.to_dict()["moe_layers"] == (1, 2)
    assert (refused.role, refused.engine, refused.model_type) == ("main", "vllm", "glm4_moe")
    assert refused.policy_hash == load_policy().hash == fused.policy_hash


def test_a_role_that_is_not_there_has_no_layers(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_of("qwen2_moe"), model_tensors("qwen2_moe"))
    refused = stock(decide(folder, "vllm", "draft"))
    assert refused.reason == Reason("family.unknown", NO_DRAFT)
    assert (refused.role, refused.moe_layers, refused.stored_layers) == ("draft", (), ())
    assert refused.stored_alike is None
    assert refused.rule == ""


def test_an_engine_that_nobody_knows(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_of("qwen2_moe"), None)
    evidence = read_evidence(folder, "vllm")
    with pytest.raises(FsePatchError) as error:
        decide_evidence(evidence, "other")
    assert str(error.value) == "unknown engine 'other'; use one of vllm, sglang"


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_rules_are_told_the_number_of_slots(tmp_path: Path, slots: int) -> None:
    config = config_of("qwen2_moe", shared_expert_intermediate_size=32 * slots)
    folder = write_checkpoint(tmp_path, config, model_tensors("qwen2_moe", slots=slots))
    evidence = read_evidence(folder, "vllm")
    quant = weight_quantisation(evidence)
    for layer in (*evidence.roles["main"].layers, None):
        facts = layer_facts(evidence, "main", layer, "vllm", quant)
        assert (facts.num_shared_slots, facts.family, facts.format) == (slots, "qwen2_moe", "plain")
        assert facts.headers is (layer is not None)
    allowed = {"id": "few", "when": {"max_shared_slots": 2}, "fuse": True, "why": "w", "source": "s"}
    decision = decide(folder, "vllm", policy=Policy((Rule.model_validate(allowed),)))
    assert code(decision) == ("ok" if slots <= 2 else "quant.unknown")


def test_a_width_that_is_no_number_of_slots_is_told_as_none(tmp_path: Path) -> None:
    config = config_of("qwen2_moe", shared_expert_intermediate_size=48)
    evidence = read_evidence(write_checkpoint(tmp_path, config, None), "vllm")
    facts = layer_facts(evidence, "main", None, "vllm", weight_quantisation(evidence))
    assert facts.num_shared_slots == 0
