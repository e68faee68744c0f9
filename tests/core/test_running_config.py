"""The configuration that an engine runs: whatever a decision rests on is compared with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fse_patch.adapters.running_config import config_differs
from fse_patch.fusion_core.checkpoint.config import moe_of
from fse_patch.fusion_core.checkpoint.families import Role, families, family_of
from fse_patch.fusion_core.decision.decide import decide
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import Merged, RoutingSpec
from fse_patch.fusion_core.reasons import Reason

from ..overrides import other
from .checkpoints import CONFIGS, config_of, write_checkpoint
from .moe import decision
from .outcomes import merged

# Without a routed_scaling_factor: a key that it lacks is no difference.
RUNNING = {
    "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 16, "moe_intermediate_size": 4,
    "shared_expert_intermediate_size": 4, "norm_topk_prob": True, "num_hidden_layers": 2,
}  # fmt: skip
LAYOUT = ExpertLayout(num_routed=8, num_shared_slots=1, top_k=2, hidden_size=16, moe_intermediate_size=4)
DECIDED = decision(LAYOUT, RoutingSpec("softmax", True), layers=(0, 1))
MADE = dataclasses.replace(DECIDED, config=moe_of(DECIDED.family, RUNNING, "config.json"))
DRAFT = {"qwen3_next": "num_nextn_predict_layers", "glm4_moe": "num_nextn_predict_layers"}


def decided(folder: Path, config: dict[str, Any], role: Role = "main") -> Merged:
    """What is decided by a config.json alone."""
    return merged(decide(write_checkpoint(folder, config, None), "vllm", role))


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    text: dict[str, Any] = config.get("text_config", config)
    return text


def differs(made: Merged, text: dict[str, Any]) -> list[Reason]:
    return list(config_differs(made, SimpleNamespace(**text)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"norm_topk_prob": None}, ["norm_topk_prob is None, config.json says True"]),
        ({"num_experts": 4}, ["num_experts is 4, config.json says 8"]),
        ({"hidden_size": 8, "moe_intermediate_size": 2}, ["hidden_size is 8", "moe_intermediate_size is 2"]),
        ({"routed_scaling_factor": 2.0}, ["routed_scaling_factor is 2.0, config.json says 1.0"]),
        ({"num_hidden_layers": 1}, ["num_hidden_layers is 1, config.json says 2"]),
        ({"mlp_only_layers": [0]}, ["mlp_only_layers is [0], config.json says []"]),
        ({"decoder_sparse_step": 2}, ["decoder_sparse_step is 2, config.json says 1"]),
        (
            {"shared_expert_intermediate_size": 8},
            ["shared_expert_intermediate_size is 8, config.json says 4"],
        ),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu', config.json says 'silu'"]),
        ({"model_type": "qwen3_next"}, ["model_type is 'qwen3_next', config.json says 'qwen2_moe'"]),
        ({"num_experts": "8"}, ["the configuration that runs: 'num_experts' is '8'"]),
    ],
)
def test_another_configuration_than_that_of_the_checkpoint_is_refused(
    changes: dict[str, Any], words: list[str]
) -> None:
    reasons = differs(MADE, {**RUNNING, **changes})
    assert [reason.code for reason in reasons] == ["config.differs"] * bool(words)
    for word in words:
        assert word in reasons[0].detail


def test_a_configuration_that_lacks_a_value_is_refused() -> None:
    left = {key: value for key, value in RUNNING.items() if key != "num_experts"}
    (reason,) = differs(MADE, left)
    assert "the configuration that runs: has no 'num_experts'" in reason.detail


def test_nothing_to_compare_with_is_refused() -> None:
    (reason,) = differs(DECIDED, RUNNING)
    assert (reason.code, "config.json" in reason.detail) == ("config.differs", True)


@pytest.mark.parametrize("family", CONFIGS)
def test_no_value_that_is_read_is_left_out(tmp_path: Path, family: str) -> None:
    config = config_of(family)
    made, text = decided(tmp_path, config), text_of(config)
    # The control: the configuration that it was decided by.
    assert differs(made, text) == []
    assert made.config is not None
    keys = sorted(made.config.values)
    spec = family_of(family)
    assert spec is not None
    assert {spec.num_experts_key, spec.top_k_key, "hidden_act", "norm_topk_prob", "n_group"} <= set(keys)
    for key in keys:
        value = made.config.values[key]
        reasons = differs(made, {**text, key: other(value)})
        assert [reason.code for reason in reasons] == ["config.differs"], key
        assert key in reasons[0].detail


def test_every_key_of_a_family_file_is_among_them(tmp_path: Path) -> None:
    for spec in families():
        text = {
            "model_type": spec.model_types[0], "num_hidden_layers": 2, "hidden_size": 8,
            "moe_intermediate_size": 4, spec.num_experts_key: 4, spec.top_k_key: 2,
        }  # fmt: skip
        for key in (spec.shared_size_key, spec.num_shared_key, spec.first_dense_key, *spec.draft_count_keys):
            text |= {key: 1} if key is not None else {}
        text |= {spec.shared_size_key: 4} if spec.shared_size_key else {}
        read = moe_of(spec, text, "config.json").values
        assert text.keys() - read.keys() <= {"model_type", *spec.draft_count_keys[1:]}, spec.name
        if spec.sparse_step:
            assert {"decoder_sparse_step", "mlp_only_layers"} <= read.keys()


def test_a_tuple_of_the_engine_is_a_list() -> None:
    assert differs(MADE, {**RUNNING, "mlp_only_layers": ()}) == []
    assert differs(MADE, {**RUNNING, "mlp_only_layers": (1,)})


@pytest.mark.parametrize("family", DRAFT)
def test_a_draft_rests_on_its_own_layers(tmp_path: Path, family: str) -> None:
    config = config_of(family, **{DRAFT[family]: 1})
    draft, main = decided(tmp_path, config, "draft"), decided(tmp_path, config)
    assert differs(draft, config) == differs(main, config) == []
    # An engine that builds one draft layer says so, whatever config.json says or leaves out.
    unsaid = {key: value for key, value in config.items() if key != DRAFT[family]}
    assert differs(draft, unsaid) == []
    two = {**config, DRAFT[family]: 2}
    assert [reason.code for reason in differs(draft, two)] == ["config.differs"]
    assert DRAFT[family] in differs(draft, two)[0].detail
    # The main model does not rest on it.
    assert differs(main, two) == []
    assert differs(draft, {**config, "num_experts_per_tok": 1, "model_type": f"{family}_mtp"})
    # Some drafts are numbered after the main layers, and others have names of their own.
    shorter = {**config, "num_hidden_layers": config["num_hidden_layers"] - 1}
    assert bool(differs(draft, shorter)) == (family == "glm4_moe")
    assert differs(main, shorter)


def test_keys_that_a_family_ignores_are_no_difference_where_config_json_has_them(tmp_path: Path) -> None:
    config = config_of("qwen2_moe", routed_scaling_factor=2.5, n_group=2)
    made = decided(tmp_path, config)
    assert differs(made, config) == []
    assert differs(made, {**config, "routed_scaling_factor": 1.0})
