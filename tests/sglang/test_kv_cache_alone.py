"""What SGLang builds of a config that quantises the KV cache alone: experts as of a plain checkpoint."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from ..core.test_quant_nothing import NOTHING, WEIGHTS

# SGLang itself wants weights wherever there is a target; such a checkpoint it does not serve.
SERVED = [
    section
    for method, section in NOTHING
    if method == "compressed-tensors"
    and not any(g["targets"] for g in section.get("config_groups", {}).values())
]
FOUR_BIT = {"config_groups": {"a": {"targets": ["Linear"], "weights": WEIGHTS}}, "format": "pack-quantized"}
PREFIX = "model.layers.0.mlp"


class Linear(SimpleNamespace):
    """A layer by its class name, which is all that targets ask for."""


class FusedMoE(SimpleNamespace):
    """Likewise."""


def built(section: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Whether SGLang makes routed experts plain, projections of the shared expert, and MXFP4 of either."""
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    config = CompressedTensorsConfig.from_config(copy.deepcopy({"ignore": [], **section}))
    mxfp4 = config._is_mxfp4_moe(layer_name=f"{PREFIX}.experts")
    schemes = [
        config.get_scheme_dict(layer, f"{PREFIX}.{name}")
        for layer, name in ((FusedMoE(), "experts.0.gate_proj"), (Linear(), "shared_expert.down_proj"))
    ]
    return schemes[0] is None, schemes[1] is None, mxfp4


def test_there_are_configs_to_ask_about() -> None:
    assert len(SERVED) >= 3


@pytest.mark.parametrize("section", SERVED)
def test_experts_are_built_plain(section: dict[str, Any]) -> None:
    assert built(section) == (True, True, False)


def test_experts_of_four_bits_are_not() -> None:
    assert built(FOUR_BIT) == (False, False, False)


def test_the_name_of_a_format_makes_mxfp4_of_any_experts() -> None:
    """So a config with that name is not one of the KV cache alone."""
    assert built({"config_groups": {}, "format": "mxfp4-pack-quantized"}) == (True, True, True)


def test_modelopt_without_an_algorithm_is_read_by_nobody() -> None:
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp8Config

    assert ModelOptFp8Config.from_config({"quant_algo": "FP8"}), "control"
    with pytest.raises(ValueError, match="quant_algo"):
        ModelOptFp8Config.from_config({"quant_method": "modelopt", "quant_algo": None})
