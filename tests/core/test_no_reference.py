"""What of a checkpoint the canary does not read, and the words for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fse_patch.errors import NoReference
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.proof.canary import reference
from fse_patch.fusion_core.proof.checkpoint_layer import CheckpointLayer

from .checkpoints import tensors_of
from .fp8 import BF16, E4M3, MLP, SCHEMES, Tensors, layer, opened, stored, wanted
from .moe import naming_of

LAYOUT = ExpertLayout(8, 1, 2, 128, 64)
UP = f"{MLP}experts.0.up_proj"
Change = Callable[[Tensors], object]


def extra(tensors: Tensors) -> None:
    tensors[f"{UP}.weight_scale_2"] = torch.ones(1)


def without(*endings: str) -> Change:
    def remove(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(endings)]:
            del tensors[name]

    return remove


def other_blocks(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        tensors[name] = tensors[name][:1]


def plain_experts(tensors: Tensors) -> None:
    for name in [name for name in tensors if tensors[name].dtype == E4M3]:
        tensors[name] = tensors[name].float()


def fp8_gate(tensors: Tensors) -> None:
    tensors[f"{MLP}gate.weight"] = tensors[f"{MLP}gate.weight"].to(E4M3)


def whole_gate(tensors: Tensors) -> None:
    tensors[f"{MLP}gate.weight"] = tensors[f"{MLP}gate.weight"].to(torch.int32)


@pytest.mark.parametrize(
    ("scheme", "change", "words"),
    [
        ("block", extra, f"{UP}.weight and what is stored with it are not fp8-block"),
        ("block", without("experts.0.up_proj.weight"),
         f"{UP}.weight_scale_inv and what is stored with it are not fp8-block"),
        ("block", without("_scale_inv"), f"{MLP}experts.0.gate_proj.weight has no scale"),
        ("block", other_blocks, "[1, 4] scales for 64 x 128 in groups of 32 x 32"),
        ("block", plain_experts,
         f"{MLP}experts.0.gate_proj.weight is torch.float32, which is not fp8-block"),
        ("block", fp8_gate, f"{MLP}gate.weight is torch.float8_e4m3fn: only plain gates are read"),
        ("block", whole_gate, f"{MLP}gate.weight is torch.int32: only plain gates are read"),
        ("block", without(f"{MLP}gate.weight"), f"the checkpoint has no {MLP}gate.weight"),
        ("block", without("shared_expert_gate.weight"),
         f"the checkpoint has no {MLP}shared_expert_gate.weight"),
        ("block", without("shared_expert.down_proj.weight", "shared_expert.down_proj.weight_scale_inv"),
         f"the checkpoint has no down_proj of expert None in {MLP}"),
        ("tensor, static", without("experts.3.up_proj.input_scale"),
         f"some gate_proj in {MLP} has no input_scale"),
        ("tensor, static", without("experts.3.down_proj.input_scale"),
         f"some down_proj in {MLP} has no input_scale"),
    ],
)  # fmt: skip
def test_what_is_stored_otherwise(tmp_path: Path, scheme: str, change: Change, words: str) -> None:
    decision = layer(scheme, LAYOUT)
    tensors = stored(decision, SCHEMES[scheme], 0)
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
    wanted(tmp_path / "before", decision, scheme, tensors)
    change(tensors)
    with pytest.raises(NoReference) as error:
        wanted(tmp_path / "after", decision, scheme, tensors)
    assert str(error.value) == words


def test_another_layer_alone(tmp_path: Path) -> None:
    decision = layer("block", LAYOUT)
    tensors = stored(decision, SCHEMES["block"], 0)
    moved = {name.replace("layers.1.", "layers.0."): tensor for name, tensor in tensors.items()}
    with pytest.raises(NoReference) as error:
        opened(tmp_path, decision, "block", moved)
    assert str(error.value) == "the checkpoint has no safetensors files with this layer"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quant_method": "awq", "bits": 8, "group_size": 32},
         f"{MLP}experts.0.gate_proj.weight: the canary does not read int8-awq"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32},
         f"{MLP}experts.0.gate_proj.weight and what is stored with it are not int4-awq"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"},
         f"{MLP}experts.0.gate_proj.weight: the canary does not read nvfp4"),
        ({"quant_method": "something"}, "nothing is known of quant_method 'something'"),
        ({"quant_method": "fp8", "modules_to_convert": ["mlp"], "ignored_layers": ["mlp"]},
         f"{MLP}experts.0.gate_proj is to be converted, and is not"),
    ],
)  # fmt: skip
def test_another_format(tmp_path: Path, section: dict[str, object], words: str) -> None:
    decision = layer("block", LAYOUT)
    held = opened(tmp_path, decision, "block", stored(decision, SCHEMES["block"], 0))
    assert reference(held, decision.moe, BF16).share_tolerance is not None, "control"
    config = {"model_type": "qwen2_moe", "quantization_config": section}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def read() -> None:
        naming = naming_of("qwen2_moe", 2)
        held = CheckpointLayer(tensors_of(tmp_path), naming, decision.role, decision.quant_method, 1)
        reference(held, decision.moe, BF16)

    with pytest.raises(NoReference) as error:
        read()
    assert str(error.value) == words
