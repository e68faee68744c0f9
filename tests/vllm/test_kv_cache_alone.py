"""What vLLM builds of a config that quantises the KV cache alone: experts as of a plain checkpoint."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from ..core.test_quant_nothing import NOTHING, WEIGHTS

SECTIONS = [section for method, section in NOTHING if method == "compressed-tensors"]
# vLLM itself wants weights wherever there is a target; such a checkpoint it does not serve.
SERVED = [
    section
    for section in SECTIONS
    if all(
        not g["targets"] or "XAttention" in g["targets"] for g in section.get("config_groups", {}).values()
    )
]
PACKAGE = "vllm.model_executor.layers.quantization.compressed_tensors"
FOUR_BIT = {"config_groups": {"a": {"targets": ["Linear"], "weights": WEIGHTS}}, "format": "pack-quantized"}


class Linear(SimpleNamespace):
    """A layer by its class name, which is all that targets ask for."""


class RoutedExperts(SimpleNamespace):
    """Likewise."""


def built(section: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[bool, bool]:
    """Whether vLLM makes routed experts plain, and projections of the shared expert."""
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_moe
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    module = getattr(compressed_tensors_moe, "compressed_tensors_moe", compressed_tensors_moe)
    wna16 = importlib.import_module(f"{PACKAGE}.compressed_tensors_moe.compressed_tensors_moe_wna16")
    plain = SimpleNamespace()
    # How a method is made is not this test's.
    monkeypatch.setattr(wna16, "CompressedTensorsWNA16MoEMethod", lambda *_: None)
    monkeypatch.setattr(module, "UnquantizedFusedMoEMethod", lambda _: plain)
    config = CompressedTensorsConfig.from_config(copy.deepcopy({"ignore": [], **section}))
    names = {f"ckpt_{p}_proj_name": f"{p}_proj" for p in ("gate", "up", "down")}
    experts = RoutedExperts(moe_config=None, **names)
    made = module.CompressedTensorsMoEMethod.get_moe_method(config, experts, "model.layers.0.mlp.experts")
    scheme = config.get_scheme_dict(Linear(), "model.layers.0.mlp.shared_expert.down_proj")
    return made is plain, scheme is None


def test_there_are_configs_to_ask_about() -> None:
    assert len(SERVED) >= 4


@pytest.mark.parametrize("section", SERVED)
def test_experts_are_built_plain(section: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert built(section, monkeypatch) == (True, True)


def test_experts_of_four_bits_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert built(FOUR_BIT, monkeypatch) == (False, False)


@pytest.mark.parametrize("section", [{"quant_method": "modelopt", "quant_algo": None}])
def test_modelopt_without_an_algorithm_is_read_by_nobody(section: dict[str, Any]) -> None:
    from vllm.model_executor.layers.quantization.modelopt import ModelOptFp8Config

    assert ModelOptFp8Config.from_config({**section, "quant_algo": "FP8"}), "control"
    with pytest.raises(ValueError, match="quant_algo"):
        ModelOptFp8Config.from_config(section)
