"""Configs that quantise no weight, such as those of the KV cache alone."""

from __future__ import annotations

from typing import Any

import pytest

from fse_patch.fusion_core.checkpoint.config import QuantConfig
from fse_patch.fusion_core.quant.methods import quantises

from .test_quant_claims import WEIGHTS

NOTHING: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("compressed-tensors", {}),
    ("compressed-tensors", {"config_groups": {}}),
    ("compressed-tensors", {"config_groups": {"a": {"targets": [], "weights": {"num_bits": 2}}}}),
    ("compressed-tensors", {"config_groups": {"a": {"targets": ["Linear"], "weights": None}}}),
    ("compressed-tensors", {"config_groups": {"a": {"targets": ["Linear"], "input_activations": {}}}}),
    (
        "compressed-tensors",
        {"config_groups": {"a": {"targets": ["XAttention"], "input_activations": {"num_bits": 8}}}},
    ),
    ("modelopt", {}),
    ("modelopt", {"quant_algo": None, "kv_cache_quant_algo": "FP8"}),
    ("modelopt-fp4", {"quant_algo": "", "quantized_layers": {}}),
]
SOMETHING: list[tuple[str, dict[str, Any]]] = [
    ("fp8", {}),
    ("brand-new", {}),
    ("compressed-tensors", {"config_groups": {"a": {"targets": ["Linear"], "weights": {}}}}),
    ("compressed-tensors", {"config_groups": {"a": {"targets": ["Linear"], "weights": WEIGHTS}}}),
    ("compressed-tensors", {"config_groups": {"a": {"weights": None}}}),
    (
        "compressed-tensors",
        {"config_groups": {"a": {"targets": ["XAttention", "Linear"], "input_activations": {"num_bits": 8}}}},
    ),
    (
        "compressed-tensors",
        {"config_groups": {"a": {"targets": ["re:.*Attention"], "input_activations": {"num_bits": 8}}}},
    ),
    ("compressed-tensors", {"transform_config": {"a": 1}}),
    ("compressed-tensors", {"format": "nvfp4-pack-quantized"}),
    ("modelopt", {"quant_algo": "FP8"}),
    ("modelopt", {"quantized_layers": {"a": {"quant_algo": "FP8"}}}),
    ("modelopt", {"config_groups": {"a": {"targets": ["Linear"]}}}),
    ("modelopt", {"key_of_tomorrow": 1}),
]


@pytest.mark.parametrize(("method", "section", "expected"), [
    *((method, section, False) for method, section in NOTHING),
    *((method, section, True) for method, section in SOMETHING),
])  # fmt: skip
def test_what_quantises_no_weight(method: str, section: dict[str, Any], expected: bool) -> None:
    quant = QuantConfig(method, source="config.json", section={"quant_method": method, **section})
    assert quantises([quant]) is expected
    # Beside one that does, it is one of two that may disagree.
    other = QuantConfig("fp8", source="config.json", section={"quant_method": "fp8"})
    assert quantises([quant, other])
    assert quantises([QuantConfig(), quant]) is expected
