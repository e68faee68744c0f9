"""What of a layer's tensors forbids fusing it whatever a policy says: each finding, word by word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fse_patch.fusion_core.evidence.gather import LayerEvidence, read_evidence
from fse_patch.fusion_core.reasons import Reason

from .checkpoints import Tensors, config_of, model_tensors, with_scales, write_checkpoint

MLP = "model.layers.1.mlp."
FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
NOT_CUT = "gate and up in one quantised tensor: not cut apart"


def second_layer(folder: Path, tensors: Tensors, **config: Any) -> LayerEvidence:
    """What is found of layer 1; layer 0 is sound."""
    write_checkpoint(folder, config_of("qwen3_next", **config), tensors)
    first, second = read_evidence(folder, "vllm").roles["main"].layers
    assert (first.layer, first.finding) == (0, None)
    return second


def but(name: str, header: Any) -> Tensors:
    """Plain tensors with one more, or another, or one less."""
    return {n: h for n, h in (model_tensors("qwen3_next") | {MLP + name: header}).items() if h is not None}


def together(tensors: Tensors, part: str) -> Tensors:
    """``tensors`` with gate and up of layer 1 in one tensor: of the shared expert, or of each routed one."""
    made: Tensors = {}
    for name, (dtype, shape) in tensors.items():
        if f"{MLP}{part}" not in name or "down_proj" in name:
            made[name] = (dtype, shape)
        elif "gate_proj" in name:
            both = (2 * shape[0], *shape[1:]) if shape else shape
            made[name.replace("gate_proj", "gate_up_proj")] = (dtype, both)
    return made


@pytest.mark.parametrize(
    ("name", "header", "finding"),
    [
        (
            "experts.3.bonus",
            ("BF16", (1,)),
            Reason(
                "quant.unknown", f"layer 1: '{MLP}experts.3.bonus' lies within the experts and is not known"
            ),
        ),
        (
            "experts.3.up_proj.weight",
            None,
            Reason("width.mismatch", "layer 1, routed: up_proj: 3 experts up to 2, config.json has 4"),
        ),
        (
            "experts.4.up_proj.weight",
            ("BF16", (32, 64)),
            Reason("width.mismatch", "layer 1, routed: up_proj: 5 experts up to 4, config.json has 4"),
        ),
        (
            "shared_expert.gate_proj.weight",
            ("BF16", (64, 64)),
            Reason(
                "width.mismatch",
                "layer 1, shared: gate_proj.weight has shape [64, 64], config.json makes it [32, 64]",
            ),
        ),
        (
            "experts.3.up_proj.weight",
            ("F32", (32, 64)),
            Reason(
                "quant.mixed",
                "layer 1, routed: up_proj.weight is BF16 [32, 64] in expert 0, F32 [32, 64] in expert 3",
            ),
        ),
        (
            "experts.1.up_proj.bias",
            ("BF16", (32,)),
            Reason("quant.mixed", "layer 1, routed: up_proj.bias is there for some experts only"),
        ),
        (
            "experts.down_proj",
            ("BF16", (4, 64, 32)),
            Reason(
                "quant.mixed",
                "layer 1, routed: down_proj is there for single experts and in one tensor for all",
            ),
        ),
        (
            "shared_expert.gate_proj.weight",
            ("F16", (32, 64)),
            Reason(
                "quant.mixed",
                "layer 1, shared: gate_proj is weight F16 matrix, up_proj weight BF16 matrix",
            ),
        ),
        (
            "shared_expert.gate_proj.weight",
            None,
            Reason("quant.mixed", "layer 1, shared: has the projections down_proj, up_proj"),
        ),
    ],
)
def test_one_tensor(tmp_path: Path, name: str, header: Any, finding: Reason) -> None:
    layer = second_layer(tmp_path, but(name, header))
    assert layer == LayerEvidence(1, None, None, finding)
    assert layer.stored_alike is (False if finding.code == "quant.mixed" else None)


@pytest.mark.parametrize(("part", "module"), [("routed", "experts"), ("shared", "shared_expert")])
def test_no_tensors_of_one_part(tmp_path: Path, part: str, module: str) -> None:
    tensors = {n: h for n, h in model_tensors("qwen3_next").items() if f"{MLP}{module}." not in n}
    finding = Reason("quant.unknown", f"layer 1: the checkpoint has no tensors of its {part} experts")
    assert second_layer(tmp_path, tensors) == LayerEvidence(1, None, None, finding)


@pytest.mark.parametrize(("part", "module"), [("routed", "experts."), ("shared", "shared_expert.")])
def test_gate_and_up_in_one_tensor(tmp_path: Path, part: str, module: str) -> None:
    """Plain ones can be cut; of quantised ones nobody knows how."""
    assert second_layer(tmp_path, together(model_tensors("qwen3_next"), module)).finding is None
    quantised = together(with_scales(model_tensors("qwen3_next"), 16), module)
    name = f"{MLP}{module}" + ("0." if part == "routed" else "") + "gate_up_proj.weight"
    quantised = {
        n: (h if "gate_up_proj.weight_scale_inv" not in n else ("F32", (4, 4))) for n, h in quantised.items()
    }
    assert quantised[name] == ("F8_E4M3", (64, 64))
    expected = LayerEvidence(1, None, None, Reason("quant.unknown", f"layer 1, {part}: {NOT_CUT}"))
    assert second_layer(tmp_path, quantised, quantization_config=FP8) == expected
    # A config that is not understood may mean anything.
    brand_new = {"quant_method": "brand-new"}
    plain = together(model_tensors("qwen3_next"), module)
    write_checkpoint(tmp_path, config_of("qwen3_next", quantization_config=brand_new), plain)
    assert read_evidence(tmp_path, "vllm").roles["main"].layers[1] == expected


def test_one_tensor_of_all_routed_experts_is_the_engines_to_cut(tmp_path: Path) -> None:
    brand_new = {"quant_method": "brand-new"}
    tensors = model_tensors("qwen3_next", stacked=True)
    assert second_layer(tmp_path, tensors, quantization_config=brand_new).finding is None


def test_a_block_across_two_slots(tmp_path: Path) -> None:
    tensors = with_scales(model_tensors("qwen3_next", slots=2), 24)
    config = {"quant_method": "fp8", "weight_block_size": [24, 24]}
    write_checkpoint(
        tmp_path,
        config_of("qwen3_next", shared_expert_intermediate_size=64, quantization_config=config),
        tensors,
    )
    assert [layer.finding for layer in read_evidence(tmp_path, "vllm").roles["main"].layers] == [
        Reason(
            "width.block",
            f"layer {n}: gate_up: fp8-block, block 24x24, dynamic activations does not end where slots of "
            "width 32 end",
        )
        for n in (0, 1)
    ]


def test_tensors_of_one_part_in_two_modules(tmp_path: Path) -> None:
    tensors = model_tensors("qwen3_5_moe")
    moved = "model.language_model.layers.1.mlp.shared_expert.down_proj.weight"
    tensors["model.layers.1.mlp.shared_expert.down_proj.weight"] = tensors.pop(moved)
    write_checkpoint(tmp_path, config_of("qwen3_5_moe"), tensors)
    modules = ["model.language_model.layers.1.mlp.shared_expert", "model.layers.1.mlp.shared_expert"]
    finding = Reason("quant.unknown", f"layer 1, shared: tensors under {modules}")
    layers = read_evidence(tmp_path, "vllm").roles["main"].layers
    assert layers[1] == LayerEvidence(1, None, None, finding)


@pytest.mark.parametrize(
    ("name", "role"), [("other.1.mlp.experts.0.x", "main"), ("mtp.other.1.mlp.experts.0.x", "draft")]
)
def test_experts_under_a_name_of_no_layer(tmp_path: Path, name: str, role: Any) -> None:
    tensors = model_tensors("qwen3_next") | {name: ("BF16", (1,)), f"{name}2": ("BF16", (1,))}
    config = config_of("qwen3_next", num_nextn_predict_layers=1)
    roles = read_evidence(write_checkpoint(tmp_path, config, tensors), "vllm").roles
    why = f"{name!r} is of an expert, and under no name of a layer that is known"
    assert {n: found.finding for n, found in roles.items()} == {
        "main": None,
        "draft": None,
        role: Reason("names.unknown", why),
    }


def test_a_tensor_under_a_second_name(tmp_path: Path) -> None:
    again = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors = model_tensors("qwen3_5_moe") | {again: ("BF16", (32, 64))}
    found = read_evidence(write_checkpoint(tmp_path, config_of("qwen3_5_moe"), tensors), "vllm")
    why = f"{again!r} is there under a second name as well; which one counts, nobody can say here"
    assert found.roles["main"].finding == Reason("names.unknown", why)


def test_the_files_of_a_model_that_nobody_knows(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model_type": "llama"}, {"a": ("BF16", (4,))})
    found = read_evidence(tmp_path, "vllm")
    assert (found.model_type, found.family, found.moe, found.roles) == ("llama", None, None, {})
    assert found.headers
    assert found.files.names == ("model-00001-of-00001.safetensors",)
    assert found.files.digest == read_evidence(tmp_path, "sglang").files.digest != ""
    assert found.quants == (found.quant,)
    assert found.refusal is None
