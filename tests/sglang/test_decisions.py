"""What SGLang's own settings forbid: the load format and the configuration as the user gave them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ..running import Checkpoints, with_dense_layer
from ..vllm.processes import in_process

OVERRIDES: dict[str, dict[str, Any]] = {
    "step": {"decoder_sparse_step": 2},
    "dense layers": {"mlp_only_layers": [0]},
    "shared width": {"shared_expert_intermediate_size": 64},
    "layers": {"num_hidden_layers": 1},
    "experts": {"num_experts_per_tok": 1},
}
# What spreads, moves or takes away: the server's arguments, and the code.
FORBIDDEN: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"tp_size": 3}, "parallel.tp"),
    "experts by rank": ({"tp_size": 2, "ep_size": 2}, "parallel.ep"),
    "experts that do not divide": ({"tp_size": 3, "ep_size": 3}, "parallel.ep"),
    "balancer": ({"ep_num_redundant_experts": 2}, "parallel.eplb"),
    "attention by rank": ({"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}, "parallel.dp"),
    "offload": ({"cpu_offload_gb": 1}, "memory.offload"),
    "sleep": ({"enable_memory_saver": True}, "memory.sleep"),
    "any adapter": ({"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["all"]}, "lora"),
    "adapters of experts": (
        {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj", "down_proj"]},
        "lora",
    ),
}
ATTENTION = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj", "o_proj"]}
# Loaders that set the format back, which is what the model's code then sees.
REWRITTEN = ("layered", "presharded")
MERGED = {"FSE_PATCH_LAYOUT": "merged"}
# GLM-4.5 as in 0.5.17, by the GPU's capability and the server's arguments.
OLD_GATE: dict[str, dict[str, Any]] = {
    "native": {"capability": [9, 0], "env": MERGED},
    "native, experts spread": {"capability": [9, 0], "ep_size": 2, "tp_size": 2, "env": MERGED},
    "native, old device": {"capability": [7, 5], "env": MERGED},
    # By itself it pairs beside what SGLang fuses.
    "native, paired": {"capability": [9, 0]},
}
# What lays experts out in another way, as a release has it or not.
LAYOUTS: dict[str, dict[str, Any]] = {
    "paged": {"options": {"enable_paged_experts": True}},
    "balanced": {"options": {"enable_waterfill": True}},
    "joined": {"options": {"ep_join_mode": "scale"}},
    "interleaved": {"env": {"SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED": "1"}},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Decisions by the name of a case."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("checkpoints"), "sglang")
    folder = checkpoints.path("qwen2_moe")
    dense = with_dense_layer(folder, tmp_path_factory.mktemp("dense") / "qwen2_moe")
    cases: dict[str, dict[str, Any]] = {
        name: {"json_model_override_args": json.dumps(override)} for name, override in OVERRIDES.items()
    }
    cases |= {name: {"load_format": name} for name in ("auto", "safetensors", "sharded_state", *REWRITTEN)}
    cases |= {f"draft {name}": {"draft_format": name} for name in ("safetensors", *REWRITTEN)}
    cases |= LAYOUTS
    cases |= {name: arguments for name, (arguments, _) in FORBIDDEN.items()}
    cases["adapters of the attention"] = ATTENTION
    given = {name: {"folder": str(folder), **case} for name, case in cases.items()}
    given["dense layer"] = {"folder": str(dense)}
    glm = str(checkpoints.path("glm4_moe_scale"))
    given |= {name: {"folder": glm, **case} for name, case in OLD_GATE.items()}
    return dict(in_process("tests.sglang.decisions:probe", json.dumps(given), FSE_PATCH="sglang"))


@pytest.mark.every_release
def test_the_load_format_is_the_one_that_was_given(found: dict[str, dict[str, Any]]) -> None:
    for name in REWRITTEN:
        for case in (name, f"draft {name}"):
            assert found[case]["load_format"] == "auto"  # what the loader has made of it
            assert found[case]["reason"] == "load.format"
            assert f"load format of sglang is {name}" in found[case]["detail"]
    assert found["sharded_state"]["reason"] == "load.format"
    # The controls.
    for name in ("auto", "safetensors", "draft safetensors"):
        assert found[name]["reason"] == "ok", found[name]


def test_what_spreads_or_moves_is_refused_by_code(found: dict[str, dict[str, Any]]) -> None:
    codes = {name: code for name, (_, code) in FORBIDDEN.items()}
    assert {name: found[name]["reason"] for name in FORBIDDEN} == codes
    assert found["width"]["detail"].endswith("run with --tp-size 2")
    assert found["experts that do not divide"]["detail"].endswith("run with --ep-size 2")
    # The control.
    assert found["adapters of the attention"]["reason"] == "ok"


@pytest.mark.every_release
def test_overrides_are_refused(found: dict[str, dict[str, Any]]) -> None:
    assert {name: found[name]["reason"] for name in OVERRIDES} == dict.fromkeys(OVERRIDES, "config.differs")
    for name, override in OVERRIDES.items():
        assert min(override) in found[name]["detail"]
    assert found["auto"]["reason"] == "ok"


@pytest.mark.every_release
def test_other_layouts_of_experts_are_refused(found: dict[str, dict[str, Any]]) -> None:
    assert {name: found[name]["reason"] for name in LAYOUTS} == dict.fromkeys(LAYOUTS, "backend.layout")
    assert "--enable-paged-experts" in found["paged"]["detail"]
    # The control: nothing of it is left for what comes next.
    assert found["dense layer"]["reason"] != "backend.layout"


@pytest.mark.every_release
def test_layers_that_sglang_leaves_without_weights_are_refused(found: dict[str, dict[str, Any]]) -> None:
    assert found["dense layer"]["reason"] == "upstream.wrong"
    assert "layers [0]: unpatched sglang answers from weights" in found["dense layer"]["detail"]


@pytest.mark.every_release
def test_the_gate_of_0_5_17_is_asked(found: dict[str, dict[str, Any]]) -> None:
    """Only what it lets fuse is fused natively, and the question leaves no trace in SGLang's settings."""
    assert found["native"]["reason"] == "upstream.already"
    assert found["native, experts spread"]["reason"] == "slower.unmeasured"
    assert found["native, old device"]["reason"] == "slower.unmeasured"
    assert found["native, paired"]["reason"] == "ok"
    assert [found[name]["disabled"] for name in OLD_GATE] == [False] * len(OLD_GATE)
