"""Tensors within the experts that nobody knows, and scales that are stored in another rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from .checkpoints import model_tensors, with_scales
from .outcomes import code, merged, stock
from .test_decide import made


@pytest.mark.parametrize(
    "name",
    [
        "experts.0.w1.weight",
        "experts.0.gate_proj_scale",
        "experts.extra",
        "experts.0.1.gate_proj.weight",
        "shared_expert.2.gate_proj.weight",
        "shared_expert.norm.weight",
        "shared_experts.up_proj.weight",
    ],
)
def test_an_unknown_tensor_within_the_experts_is_a_doubt(tmp_path: Path, name: str) -> None:
    tensors = model_tensors("qwen3_next")
    full = f"model.layers.1.mlp.{name}"
    refusal = stock(made(tmp_path, "qwen3_next", tensors | {full: ("BF16", (32, 64))})).reason
    assert refusal.code == "quant.unknown", refusal.detail
    assert "layer 1" in refusal.detail
    # Control: beside the experts it is none of this decision's business.
    beside = full.replace(".mlp.", ".mlp.other.")
    assert merged(made(tmp_path, "qwen3_next", tensors | {beside: ("BF16", (32, 64))}))


@pytest.mark.parametrize(
    ("routed", "shared", "fuses"),
    [((), (), True), ((1,), (1,), True), ((), (1,), False), ((1, 1), (), False)],
)
def test_scales_of_another_rank_are_another_way_to_store(
    tmp_path: Path, routed: tuple[int, ...], shared: tuple[int, ...], fuses: bool
) -> None:
    tensors = with_scales(model_tensors("qwen3_next"), None)
    for name in list(tensors):
        if name.endswith("_scale"):
            tensors[name] = ("F32", shared if ".shared_expert." in name else routed)
    decision = made(tmp_path, "qwen3_next", tensors, quantization_config={"quant_method": "fp8"})
    assert code(decision) == ("ok" if fuses else "quant.mixed"), decision


def test_single_experts_have_modules(tmp_path: Path) -> None:
    tensors = model_tensors("qwen3_next")
    assert merged(made(tmp_path / "a", "qwen3_next", tensors))
    bare = {n.removesuffix(".weight") if "_proj" in n else n: t for n, t in tensors.items()}
    assert code(made(tmp_path / "b", "qwen3_next", bare)) == "quant.unknown"


def test_one_projection_of_all_experts_and_single_ones_for_the_other(tmp_path: Path) -> None:
    tensors = model_tensors("qwen3_next", stacked=True)
    assert merged(made(tmp_path / "a", "qwen3_next", tensors))
    single = model_tensors("qwen3_next")
    mixed = {n: t for n, t in tensors.items() if n != "model.layers.0.mlp.experts.down_proj"}
    mixed |= {n: t for n, t in single.items() if ".layers.0.mlp.experts." in n and "down_proj" in n}
    refusal = stock(made(tmp_path / "b", "qwen3_next", mixed)).reason
    assert refusal.code == "quant.unknown"
    assert "in one tensor for all" in refusal.detail
