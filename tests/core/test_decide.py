"""Decisions on whole checkpoints, each beside the change that flips it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision.decide import decide, decide_roles
from fse_patch.fusion_core.decision.outcome import Decision
from fse_patch.fusion_core.evidence.gather import read_evidence

from .checkpoints import (
    CONFIGS,
    MOE_LAYERS,
    SHARED,
    Tensors,
    config_of,
    mlp_tensors,
    model_tensors,
    with_scales,
    write_checkpoint,
)
from .outcomes import code, merged, stock

FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def made(folder: Path, family: str, tensors: Tensors | None, **changes: Any) -> Decision:
    return decide(write_checkpoint(folder, config_of(family, **changes), tensors), "vllm")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_unquantised_checkpoints_fuse(tmp_path: Path, family: str, stacked: bool, dtype: str) -> None:
    decision = merged(made(tmp_path, family, model_tensors(family, stacked=stacked, dtype=dtype)))
    assert (code(decision), decision.rule) == ("ok", "unquantised")
    assert list(decision.moe.layers) == MOE_LAYERS[family]
    assert decision.moe.layout.num_experts == 5
    assert dtype in decision.detail


@pytest.mark.parametrize("family", CONFIGS)
def test_one_shared_tensor_of_another_dtype_refuses_all_layers(tmp_path: Path, family: str) -> None:
    tensors = model_tensors(family)
    name = next(n for n in reversed(tensors) if f".{SHARED[family]}.down_proj" in n)
    tensors[name] = ("F32", tensors[name][1])
    decision = stock(made(tmp_path, family, tensors))
    assert (decision.reason.code, decision.rule) == ("quant.mixed", "mixed")
    assert decision.to_dict()["fused_layers"] == ()
    assert f"layer {MOE_LAYERS[family][-1]}: " in decision.reason.detail
    assert "down: routed weight BF16 matrix, shared weight F32 matrix" in decision.reason.detail


def test_the_shared_gate_has_no_vote(tmp_path: Path) -> None:
    tensors = model_tensors("qwen2_moe")
    tensors["model.layers.0.mlp.shared_expert_gate.weight"] = ("F32", (1, 64))
    assert merged(made(tmp_path, "qwen2_moe", tensors))


@pytest.mark.parametrize(
    ("name", "header", "reason", "seen"),
    [
        ("experts.3.up_proj.weight", ("F32", (32, 64)), "quant.mixed", "F32 [32, 64] in expert 3"),
        ("experts.3.up_proj.weight", None, "width.mismatch", "up_proj: 3 experts up to 2"),
        ("experts.4.up_proj.weight", ("BF16", (32, 64)), "width.mismatch", "5 experts up to 4"),
        ("experts.1.up_proj.weight", ("BF16", (64, 32)), "width.mismatch", "[64, 32]"),
        ("experts.1.up_proj.bias", ("BF16", (32,)), "quant.mixed", "some experts only"),
        ("experts.down_proj", ("BF16", (4, 64, 32)), "quant.mixed", "in one tensor for all"),
        ("shared_expert.gate_proj.weight", ("BF16", (64, 64)), "width.mismatch", "[32, 64]"),
        ("shared_expert.gate_proj.weight", ("F16", (32, 64)), "quant.mixed", "gate_proj is weight F16"),
        ("shared_expert.gate_proj.weight", None, "quant.mixed", "has the projections down_proj, up_proj"),
        ("shared_expert.down_proj.bias", ("BF16", (64,)), "quant.mixed", "bias BF16"),
    ],
)
def test_a_layer_that_differs_is_named(
    tmp_path: Path, name: str, header: tuple[str, tuple[int, ...]] | None, reason: str, seen: str
) -> None:
    tensors = model_tensors("qwen3_next")
    full = f"model.layers.1.mlp.{name}"
    if header is None:
        del tensors[full]
    else:
        tensors[full] = header
    refusal = stock(made(tmp_path, "qwen3_next", tensors)).reason
    assert refusal.code == reason
    assert "layer 1" in refusal.detail
    assert seen in refusal.detail


def test_stacked_experts_need_the_sizes_of_the_config(tmp_path: Path) -> None:
    tensors = model_tensors("qwen3_5_moe", stacked=True)
    assert merged(made(tmp_path, "qwen3_5_moe", tensors))
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    for shape in ((5, 64, 64), (4, 64, 32), (4, 32, 64)):
        tensors[name] = ("BF16", shape)
        refusal = stock(made(tmp_path, "qwen3_5_moe", tensors)).reason
        assert refusal.code == "width.mismatch"
        assert str(list(shape)) in refusal.detail


def test_experts_are_numbered_from_zero(tmp_path: Path) -> None:
    renamed = {n.replace("experts.0.", "experts.4."): t for n, t in model_tensors("qwen3_next").items()}
    refusal = stock(made(tmp_path, "qwen3_next", renamed)).reason
    assert refusal.code == "width.mismatch"
    assert "4 experts up to 4" in refusal.detail


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = model_tensors("qwen3_5_moe")
    again = "model.layers.1.mlp.experts.2.up_proj.weight"
    refusal = stock(made(tmp_path, "qwen3_5_moe", tensors | {again: ("F32", (32, 64))})).reason
    assert refusal.code == "names.unknown"
    assert f"'{again}' is there under a second name" in refusal.detail
    # Control: the other prefix alone is as good.
    only = {n.replace("model.language_model.", "model."): t for n, t in tensors.items()}
    assert merged(made(tmp_path, "qwen3_5_moe", only))


@pytest.mark.parametrize("missing", ["shared_expert", "experts"])
def test_a_layer_without_experts_in_the_tensors_is_no_evidence(tmp_path: Path, missing: str) -> None:
    tensors = {n: t for n, t in model_tensors("qwen2_moe").items() if f"layers.1.mlp.{missing}." not in n}
    refusal = stock(made(tmp_path, "qwen2_moe", tensors)).reason
    assert refusal.code == "quant.unknown"
    assert "layer 1: the checkpoint has no tensors" in refusal.detail


@pytest.mark.parametrize("slots", [1, 4, 8])
def test_a_wide_shared_expert_takes_several_slots(tmp_path: Path, slots: int) -> None:
    tensors = model_tensors("qwen2_moe", slots=slots)
    decision = made(tmp_path, "qwen2_moe", tensors, shared_expert_intermediate_size=32 * slots)
    assert merged(decision).moe.layout.num_shared_slots == slots
    glm = made(tmp_path / "glm", "glm4_moe", model_tensors("glm4_moe", slots=slots), n_shared_experts=slots)
    assert merged(glm).moe.layout.num_shared_slots == slots


@pytest.mark.parametrize(
    ("family", "changes", "reason", "seen"),
    [
        ("qwen2_moe", {"shared_expert_intermediate_size": 48}, "width.mismatch", "48 is no multiple"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 16}, "width.mismatch", "16 is no multiple"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared.absent", "width 0"),
        ("glm4_moe", {"n_shared_experts": 0}, "shared.absent", "width 0"),
        ("qwen2_moe", {"hidden_act": "gelu"}, "activation.differs", "'gelu'"),
        ("qwen2_moe", {"num_experts": 0}, "family.unknown", "no layer with routed experts"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1]}, "family.unknown", "no layer with routed experts"),
    ],
)
def test_refusals_by_config_alone(
    tmp_path: Path, family: str, changes: dict[str, Any], reason: str, seen: str
) -> None:
    assert merged(made(tmp_path, family, None)), "control: the unchanged config fuses"
    refusal = stock(made(tmp_path, family, None, **changes)).reason
    assert refusal.code == reason
    assert seen in refusal.detail


def test_a_block_across_slots_is_refused(tmp_path: Path) -> None:
    config: dict[str, Any] = {"shared_expert_intermediate_size": 64}
    tensors = model_tensors("qwen2_moe", slots=2)
    for block, reason in ((16, "ok"), (24, "width.block")):
        quant = {"quant_method": "fp8", "weight_block_size": [block, block]}
        scaled = with_scales(tensors, block)
        assert code(made(tmp_path, "qwen2_moe", scaled, quantization_config=quant, **config)) == reason
        # One slot is never cut, so no block can lie across its edge.
        whole = with_scales(model_tensors("qwen2_moe"), block)
        assert code(made(tmp_path, "qwen2_moe", whole, quantization_config=quant)) == "ok"


@pytest.mark.parametrize("model_type", ["llama", "glm4_moe_x", "qwen2_moe_x", ""])
def test_unknown_families_are_refused(tmp_path: Path, model_type: str) -> None:
    config = config_of("qwen2_moe") | {"model_type": model_type}
    decision = decide(write_checkpoint(tmp_path, config, None), "sglang")
    assert (stock(decision).reason.code, decision.model_type) == ("family.unknown", model_type)


def test_a_model_without_a_shared_expert_is_no_unknown_one(tmp_path: Path) -> None:
    config = config_of("qwen2_moe") | {"model_type": "qwen3_moe"}
    decision = stock(decide(write_checkpoint(tmp_path, config, None), "vllm"))
    assert decision.reason.code == "shared.absent"
    assert "qwen3_moe" in decision.reason.detail


def test_without_headers_the_config_decides_and_says_so(tmp_path: Path) -> None:
    decision = merged(made(tmp_path, "glm4_moe", None))
    assert decision.rule == "unquantised-config-only"
    assert "no safetensors headers" in decision.detail
    quantised = made(tmp_path, "glm4_moe", None, quantization_config=FP8)
    assert stock(quantised).reason.code == "quant.unknown"


def test_fp8_in_tensors_that_no_config_declares_is_refused(tmp_path: Path) -> None:
    for block in (16, None):
        decision = made(tmp_path, "qwen3_next", with_scales(model_tensors("qwen3_next"), block))
        assert stock(decision).reason.code == "quant.contradiction"


def test_routing_comes_from_the_config(tmp_path: Path) -> None:
    glm = merged(made(tmp_path, "glm4_moe", None, n_group=2, topk_group=1)).moe
    assert (glm.routing.scoring, glm.routing.routed_scaling_factor) == ("sigmoid", 2.5)
    assert (glm.routing.num_expert_group, glm.routing.topk_group) == (2, 1)
    assert glm.routing.has_correction_bias
    assert glm.shared_weight == "constant"
    two = merged(made(tmp_path, "glm4_moe", None, n_group=4, topk_group=2)).moe
    assert (two.routing.num_expert_group, two.routing.topk_group) == (4, 2)
    qwen = merged(made(tmp_path / "q", "qwen2_moe", None, norm_topk_prob=True)).moe
    assert (qwen.routing.renormalize, qwen.routing.has_correction_bias) == (True, False)
    assert qwen.shared_weight == "sigmoid_gate"


DRAFTS = {
    "qwen3_next": ("mtp.layers.0.", {"num_nextn_predict_layers": 1}, 0),
    "qwen3_5_moe": ("mtp.layers.0.", {"mtp_num_hidden_layers": 1}, 0),
    "glm4_moe": ("model.layers.3.", {"num_nextn_predict_layers": 1}, 3),
}


@pytest.mark.parametrize("family", DRAFTS)
def test_the_draft_is_decided_apart(tmp_path: Path, family: str) -> None:
    prefix, changes, layer = DRAFTS[family]
    shared = SHARED[family]
    tensors = model_tensors(family) | mlp_tensors(prefix, shared=shared)
    for extra in (changes, {}):
        roles = decide_roles(write_checkpoint(tmp_path, config_of(family, **extra), tensors), "vllm")
        assert merged(roles["draft"]).moe.layers == (layer,)
        assert list(merged(roles["main"]).moe.layers) == MOE_LAYERS[family]
    tensors[f"{prefix}mlp.{shared}.up_proj.weight"] = ("F32", (32, 64))
    tensors[f"{prefix}mlp.{shared}.gate_proj.weight"] = ("F32", (32, 64))
    roles = decide_roles(write_checkpoint(tmp_path, config_of(family, **changes), tensors), "vllm")
    assert merged(roles["main"])
    assert stock(roles["draft"]).reason.code == "quant.mixed"


@pytest.mark.parametrize("family", DRAFTS)
def test_a_declared_draft_without_tensors(tmp_path: Path, family: str) -> None:
    _, changes, _ = DRAFTS[family]
    folder = write_checkpoint(tmp_path, config_of(family, **changes), model_tensors(family))
    assert read_evidence(folder, "vllm").roles["draft"].in_checkpoint is False
    assert read_evidence(folder, "vllm").roles["main"].in_checkpoint is True
    assert code(decide(folder, "vllm", "draft")) == "quant.unknown"
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert merged(decide(folder, "vllm", "draft"))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen2_moe", {"decoder_sparse_step": 2}), ("qwen3_next", {"mlp_only_layers": [0]})],
)
def test_layers_that_an_engine_builds_without_weights_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    """SGLang builds each layer of these sparse; vLLM builds them as config.json says."""
    config = config_of(family, **changes)
    sparse = write_checkpoint(tmp_path / "headers", config, model_tensors(family, [1]))
    for folder in (sparse, write_checkpoint(tmp_path / "config", config, None)):
        refusal = stock(decide(folder, "sglang")).reason
        assert refusal.code == "upstream.wrong"
        assert "none for layers [0]: unpatched sglang answers from weights that were never" in refusal.detail
        assert merged(decide(folder, "vllm")).moe.layers == (1,)
    # Where the checkpoint has them after all, what SGLang builds is right, and what config.json names fuses.
    every = write_checkpoint(tmp_path / "every", config, model_tensors(family, [0, 1]))
    assert merged(decide(every, "sglang")).moe.layers == (1,)
    # The control: a family whose layers both engines build by config.json.
    dense = write_checkpoint(tmp_path / "glm", config_of("glm4_moe"), model_tensors("glm4_moe"))
    assert merged(decide(dense, "sglang")).stored_layers == (1, 2)


def test_no_draft_is_a_refusal_when_asked_for(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_of("qwen2_moe"), model_tensors("qwen2_moe"))
    assert set(decide_roles(folder, "vllm")) == {"main"}
    assert code(decide(folder, "vllm", "draft")) == "family.unknown"


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_tensors_does_not_matter(tmp_path: Path, seed: int) -> None:
    tensors = model_tensors("qwen3_next")
    expected = made(tmp_path / "a", "qwen3_next", tensors)
    names = list(tensors)
    random.Random(seed).shuffle(names)
    config = config_of("qwen3_next")
    shuffled = write_checkpoint(tmp_path / "b", config, {n: tensors[n] for n in names}, shards=7)
    assert decide(shuffled, "vllm") == expected


def test_an_unknown_engine_is_bad_input(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_of("qwen2_moe"), None)
    with pytest.raises(FsePatchError, match="unknown engine 'vlm'; use one of vllm, sglang"):
        decide(folder, "vlm")


def test_no_config_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(FsePatchError, match=r"has no config\.json"):
        decide(tmp_path, "vllm")
    with pytest.raises(FsePatchError, match="no such folder"):
        decide(tmp_path / "gone", "vllm")


@pytest.mark.parametrize(
    ("family", "key"),
    [("qwen2_moe", "shared_expert_intermediate_size"), ("glm4_moe", "n_shared_experts")],
)
def test_a_shared_expert_of_null_is_nothing_to_fuse(tmp_path: Path, family: str, key: str) -> None:
    config = config_of(family)
    assert merged(decide(write_checkpoint(tmp_path, config, None), "vllm")), "control"
    decision = stock(decide(write_checkpoint(tmp_path, config | {key: None}, None), "vllm"))
    assert decision.reason.code == "shared.absent"
    assert "width 0" in decision.reason.detail
    assert (decision.layout, decision.moe) == (None, None)


@pytest.mark.parametrize("family", ["qwen3_next", "glm4_moe"])
def test_a_draft_of_null_layers_is_none_unless_the_tensors_show_it(tmp_path: Path, family: str) -> None:
    config = config_of(family) | {"num_nextn_predict_layers": None}
    tensors = model_tensors(family)
    folder = write_checkpoint(tmp_path, config, tensors)
    assert decide_roles(folder, "vllm").keys() == {"main"}
    assert stock(decide(folder, "vllm", "draft")).reason.code == "family.unknown"
    prefix, _, layer = DRAFTS[family]
    write_checkpoint(tmp_path, config, tensors | mlp_tensors(prefix, shared=SHARED[family]))
    assert merged(decide_roles(folder, "vllm")["draft"]).moe.layers == (layer,)
