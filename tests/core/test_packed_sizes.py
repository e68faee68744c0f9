"""Sizes of packed weights: they show a difference that no config can hide, and a doubt is no agreement."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from fse_patch.fusion_core.checkpoint.config import QuantConfig
from fse_patch.fusion_core.checkpoint.headers import TensorHeader
from fse_patch.fusion_core.decision.decide import decide
from fse_patch.fusion_core.decision.native import gets_wrong
from fse_patch.fusion_core.evidence import agreement
from fse_patch.fusion_core.evidence.specs import ALL_EXPERTS, MlpSpec, TensorSpec, sizes_differ
from fse_patch.fusion_core.quant.methods import packs

from .golden import KINDS, ROWS, write_row
from .outcomes import code

# Kind of routed experts -> kinds of the shared expert of which the sizes show that they are others.
OTHERS = {
    "int4-gptq:128": ("int8-gptq:128", "int4-gptq:64", "int4-gptq:512"),
    "int8-gptq:128": ("int4-gptq:128",),
    "int4-awq:128": ("int8-awq:128", "int4-awq:32"),
    "int4-packed:128": ("int8-packed:128", "int4-packed:32"),
}
# Key that nobody knows, in a config of which nothing else is amiss.
UNKNOWN: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "key_of_tomorrow": 1},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "key_of_tomorrow": 1},
    "packed": {"quant_method": "compressed-tensors", "key_of_tomorrow": 1},
}


def row(model: str, routed: str, shared: str, known: bool = False) -> dict[str, Any]:
    method = routed.partition(":")[0].partition("-")[2]
    quantization = {k: v for k, v in UNKNOWN[method].items() if not (known and k == "key_of_tomorrow")}
    if known and method == "packed":
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
        groups = {"a": {"targets": ["Linear"], "weights": weights}}
        quantization |= {"format": "pack-quantized", "config_groups": groups}
    return {
        "id": "made",
        "model": model,
        "quantization": quantization,
        "stored": {"routed": routed, "shared": shared},
    }


@pytest.mark.parametrize("model", ["glm4_5", "qwen1_5_moe", "qwen2_57b"])
@pytest.mark.parametrize(("routed", "shared"), [(r, s) for r, others in OTHERS.items() for s in others])
def test_sizes_show_a_difference_whatever_the_config_says(
    tmp_path: Path, model: str, routed: str, shared: str
) -> None:
    """In one slot, in four and in eight: a wide shared expert is as many times as wide."""
    decision = decide(write_row(tmp_path / "unknown", row(model, routed, shared)), "sglang")
    assert (code(decision), decision.stored_alike) == ("quant.mixed", False)
    assert "different ways" in gets_wrong({}, decision)
    # Understood, and not so of one part: a contradiction, and a difference all the same.
    decision = decide(write_row(tmp_path / "known", row(model, routed, shared, known=True)), "sglang")
    assert (code(decision), decision.stored_alike) == ("quant.contradiction", False)


@pytest.mark.parametrize("model", ["glm4_5", "qwen1_5_moe", "qwen2_57b"])
@pytest.mark.parametrize("kind", ["int4-gptq:128", "int4-awq:128", "int4-packed:128"])
def test_equal_sizes_and_a_key_that_nobody_knows_are_a_doubt(tmp_path: Path, model: str, kind: str) -> None:
    decision = decide(write_row(tmp_path / "unknown", row(model, kind, kind)), "sglang")
    assert (code(decision), decision.stored_alike, decision.packed) == ("quant.unknown", None, True)
    assert "packed integers" in gets_wrong({}, decision)
    known = decide(write_row(tmp_path / "known", row(model, kind, kind, known=True)), "sglang")
    assert (code(known), known.stored_alike) == ("ok", True)
    assert gets_wrong({}, known) == ""


@pytest.mark.parametrize(
    "name",
    ["glm-4.5-gptq-8-bit-shared-expert-and-a-new-key", "glm-4.6-awq-8-bit-shared-expert-and-a-new-key"],
)
def test_it_is_the_sizes_that_are_compared(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = next(row for row in ROWS if row["id"] == name)
    assert code(decide(write_row(tmp_path, made), "vllm")) == "quant.mixed"
    monkeypatch.setattr(agreement, "sizes_differ", lambda *_: "")
    assert code(decide(write_row(tmp_path, made), "vllm")) == "quant.unknown", "control"


def test_weights_of_one_number_an_element_are_no_doubt(tmp_path: Path) -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "key_of_tomorrow": 1}
    made = row("glm4_5", "int4-gptq:128", "int4-gptq:128")
    made |= {"quantization": fp8, "stored": {"routed": "fp8-block:128", "shared": "fp8-block:128"}}
    decision = decide(write_row(tmp_path, made), "sglang")
    assert (code(decision), decision.stored_alike, decision.packed) == ("quant.unknown", True, False)
    assert gets_wrong({}, decision) == ""


def test_without_headers_the_configs_words_tell_whether_integers_are_packed(tmp_path: Path) -> None:
    for method, packed in (("gptq", True), ("awq", True), ("packed", True)):
        made = {"id": "made", "model": "glm4_5", "quantization": UNKNOWN[method]}
        decision = decide(write_row(tmp_path / method, made), "sglang")
        assert (decision.stored_alike, decision.packed) == (None, packed)
        assert gets_wrong({}, decision)
    made = {"id": "made", "model": "glm4_5", "quantization": {"quant_method": "fp8"}}
    decision = decide(write_row(tmp_path / "fp8", made), "sglang")
    assert (decision.stored_alike, decision.packed) == (None, False)
    assert gets_wrong({}, decision) == ""
    plain = decide(write_row(tmp_path / "plain", {"id": "made", "model": "glm4_5"}), "sglang")
    assert (plain.stored_alike, gets_wrong({}, plain)) == (None, "")


@pytest.mark.parametrize(
    ("method", "scheme", "expected"),
    [
        ("none", "", False),
        ("fp8", "", False),
        ("fp8", "block", False),
        ("fbgemm-fp8", "", False),
        ("gptq", "int4", True),
        ("awq", "int4", True),
        ("inc", "int4", True),
        ("compressed-tensors", "float-quantized", False),
        ("compressed-tensors", "int-quantized", False),
        ("compressed-tensors", "pack-quantized", True),
        ("compressed-tensors", "mixed-precision", True),
        ("modelopt", "fp8", False),
        ("modelopt", "nvfp4", True),
        ("modelopt", "mixed_precision", True),
        ("mxfp4", "", True),
        ("quark", "fp8_e4m3", False),
        ("quark", "fp4", True),
        ("bitsandbytes", "", True),
        ("gguf", "", True),
        ("brand-new", "", True),
    ],
)
def test_methods_that_pack(method: str, scheme: str, expected: bool) -> None:
    assert packs(QuantConfig(method, scheme)) is expected


def tensors(shape: tuple[int, ...], dtype: str = "I32", number: int = 0, suffix: str = "qweight") -> Any:
    return {("gate_proj", suffix): {number: TensorHeader(dtype, shape)}}


@pytest.mark.parametrize(
    ("routed", "shared", "slots", "differ"),
    [
        ((16, 32), (16, 32), 1, False),
        ((16, 32), (32, 32), 1, True),
        ((16, 32), (16, 64), 1, True),
        ((16, 32), (16, 64), 2, False),
        ((16, 32), (32, 32), 2, False),
        ((16, 32), (32, 64), 2, True),
        ((16, 32), (16, 128), 2, True),
        ((16, 32), (16, 32), 2, False),
        # Groups: the last of each slot may be a partial one.
        ((3, 32), (5, 32), 2, False),
        ((3, 32), (6, 32), 2, False),
        ((3, 32), (4, 32), 2, True),
        ((3, 32), (7, 32), 2, True),
        ((16, 32), (32, 16), None, False),
        ((16, 32), (16, 32, 1), 1, True),
        ((), (), 1, False),
    ],
)
def test_at_most_one_size_grows_with_the_slots(
    routed: tuple[int, ...], shared: tuple[int, ...], slots: int | None, differ: bool
) -> None:
    assert bool(sizes_differ(tensors(routed), tensors(shared, number=ALL_EXPERTS), slots)) == differ


def test_one_tensor_of_all_experts_is_compared_without_its_first_size() -> None:
    together = tensors((4, 16, 32), number=ALL_EXPERTS)
    assert sizes_differ(together, tensors((16, 32), number=ALL_EXPERTS), 1) == ""
    said = sizes_differ(together, tensors((32, 32), number=ALL_EXPERTS), 1)
    assert said == "gate_proj.qweight is [16, 32] in routed experts, [32, 32] in the shared one"


def test_dense_weights_and_their_scales_are_not_compared_by_size() -> None:
    for dtype, differ in (("F8_E4M3", False), ("U8", True)):
        parts = [
            tensors((16, 32), dtype, suffix="weight") | tensors(shape, "F32", suffix="weight_scale")
            for shape in ((1, 2), (2, 2))
        ]
        assert bool(sizes_differ(parts[0], parts[1], 1)) == differ


def test_what_one_part_has_not_is_not_compared() -> None:
    assert sizes_differ(tensors((16, 32)), tensors((32, 32), suffix="scales"), 1) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_which_kinds_are_packed(kind: str) -> None:
    parts = KINDS[kind](256, 256, 128)
    projection = tuple(TensorSpec(suffix, dtype, "") for suffix, (dtype, _) in parts.items())
    dense = kind.startswith(("bf16", "f16", "f32", "fp8")) or kind == "int8-channel"
    assert MlpSpec(projection, projection).packed is not dense
    plain = (TensorSpec("weight", "BF16", "matrix"),)
    assert MlpSpec(plain, projection).packed is MlpSpec(projection, plain).packed is not dense


def test_a_layer_in_doubt_is_a_role_in_doubt(tmp_path: Path) -> None:
    made = copy.deepcopy(
        next(row for row in ROWS if row["id"] == "qwen3-next-gptq-dynamic-override-of-one-expert")
    )
    decision = decide(write_row(tmp_path, made), "sglang")
    assert (decision.stored_alike, decision.packed) == (None, True)
