"""Both outcomes of a decision: what cannot be one, what a refusal keeps, and both as plain data."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import Merged, RoutingSpec, Stock, remarked
from fse_patch.fusion_core.reasons import FUSES, Reason

from .moe import moe_spec
from .outcomes import code

MOE = moe_spec(
    ExpertLayout(num_routed=4, num_shared_slots=2, top_k=2, hidden_size=8, moe_intermediate_size=3),
    RoutingSpec("sigmoid", True, 2.5, 2, 1, has_correction_bias=True),
    "constant",
    layers=(1, 3),
)
COMMON: dict[str, Any] = {
    "role": "draft",
    "engine": "sglang",
    "model_type": "glm4_moe",
    "rule": "unquantised",
    "policy_hash": "abc",
    "quant_method": "none",
    "formats": ("plain",),
    "stored_alike": True,
}
MERGED = Merged(**COMMON, moe=MOE, detail="2 sparse layers")
LORA = Reason("lora", "LoRA is enabled")
# What other tools read, in this order.
KEYS = [
    "role", "fuse", "reason", "detail", "weight_layout", "rule", "engine", "model_type", "policy_hash",
    "quant_method", "stored_alike", "formats", "layout", "routing", "shared_weight", "moe_layers",
    "fused_layers",
]  # fmt: skip
PLAIN_MOE = {
    "layout": {
        "num_routed": 4,
        "num_shared_slots": 2,
        "top_k": 2,
        "hidden_size": 8,
        "moe_intermediate_size": 3,
    },
    "routing": {
        "scoring": "sigmoid",
        "renormalize": True,
        "routed_scaling_factor": 2.5,
        "num_expert_group": 2,
        "topk_group": 1,
        "has_correction_bias": True,
    },
    "shared_weight": "constant",
    "moe_layers": (1, 3),
}


def test_contradictory_ones_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="fuse no layer"):
        Merged(**COMMON, moe=dataclasses.replace(MOE, layers=()))
    with pytest.raises(ValueError, match="needs a reason"):
        Stock(**COMMON, reason=Reason(FUSES, "all is well"))
    kinds: tuple[Any, ...] = (Merged, Stock)
    for kind in kinds:
        # What fuses has layers, what does not has a reason.
        with pytest.raises(TypeError, match="missing"):
            kind(**COMMON)
        # And neither has what the other is about.
        with pytest.raises(TypeError, match="unexpected"):
            kind(**COMMON, moe=MOE, reason=LORA)
    # The controls.
    assert code(Merged(**COMMON, moe=MOE)) == "ok"
    assert code(Stock(**COMMON, reason=LORA)) == "lora"


def test_none_can_be_changed() -> None:
    for decision in (MERGED, MERGED.refused(LORA)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            decision.rule = "another"  # type: ignore[misc]


def test_a_refusal_keeps_what_the_checkpoint_says() -> None:
    refused = MERGED.refused(LORA)
    assert isinstance(refused, Stock)
    assert refused.reason == LORA
    assert {name: getattr(refused, name) for name in COMMON} == COMMON
    assert (refused.layout, refused.moe_layers) == (MOE.layout, (1, 3))
    assert refused.moe == MOE
    # The first one is as it was.
    assert MERGED.moe == MOE


@pytest.mark.parametrize("unknown", ["layout", "routing", "shared_weight"])
def test_layers_of_which_a_part_is_unknown_are_no_spec(unknown: str) -> None:
    refused, less = MERGED.refused(LORA), dict[str, Any]({unknown: None})
    assert dataclasses.replace(refused, **less).moe is None
    assert refused.moe is not None


def test_a_remark_stands_behind_the_line_of_either() -> None:
    said = remarked(MERGED, "; and more")
    assert said == dataclasses.replace(MERGED, detail="2 sparse layers; and more")
    refused = remarked(MERGED.refused(LORA), "; and more")
    assert refused == MERGED.refused(Reason("lora", "LoRA is enabled; and more"))
    assert remarked(MERGED, "") == MERGED


def test_as_plain_data() -> None:
    fuses, refused = MERGED.to_dict(), MERGED.refused(LORA).to_dict()
    assert list(fuses) == list(refused) == KEYS
    assert fuses == {
        **COMMON,
        **PLAIN_MOE,
        "fuse": True,
        "reason": "ok",
        "detail": "2 sparse layers",
        "weight_layout": "merged",
        "fused_layers": (1, 3),
    }
    assert refused == {
        **COMMON,
        **PLAIN_MOE,
        "fuse": False,
        "reason": "lora",
        "detail": "LoRA is enabled",
        "weight_layout": "",
        "fused_layers": (),
    }
    assert json.loads(json.dumps(fuses))["layout"] == PLAIN_MOE["layout"]


def test_a_refusal_of_which_nothing_is_known_has_the_same_keys() -> None:
    bare = Stock(role="main", engine="vllm", reason=Reason("evidence.unreadable", "no config.json"))
    told = bare.to_dict()
    assert list(told) == KEYS
    assert {key for key, value in told.items() if value is None} == {
        "stored_alike", "layout", "routing", "shared_weight",
    }  # fmt: skip
    assert (told["moe_layers"], told["fused_layers"], told["formats"]) == ((), (), ())
