"""What each parser makes of its format's config, module by module."""

from __future__ import annotations

from typing import Any

import pytest

from fse_patch.fusion_core.checkpoint.config import QuantConfig
from fse_patch.fusion_core.quant.claims import PLAIN, Claim, Doubt
from fse_patch.fusion_core.quant.methods import FORMATS, LAYOUTS, PARSERS, resolver_for

LAYER = "model.layers.1.mlp"
ROUTED, SHARED = f"{LAYER}.experts.3.up_proj", f"{LAYER}.shared_expert.up_proj"
WEIGHTS: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def claim(method: str, name: str = ROUTED, /, **section: Any) -> Claim:
    quant = QuantConfig(method, source="config.json", section={"quant_method": method, **section})
    return resolver_for([quant])(name)


def doubt_of(method: str, section: dict[str, Any]) -> str:
    """The words of the doubt that a config leads to, less the file's name."""
    with pytest.raises(Doubt) as doubt:
        claim(method, **section)
    return str(doubt.value).removeprefix("config.json: ")


def ct(weights: dict[str, Any], form: str, name: str = ROUTED, **rest: Any) -> Claim:
    group = {"targets": ["Linear"], "weights": weights, **rest.pop("group", {})}
    return claim("compressed-tensors", name, format=form, config_groups={"group_0": group}, **rest)


def linear(weights: dict[str, Any] | None, **rest: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, **rest}
    return {"format": "pack-quantized", "config_groups": {"a": group}}


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: claim("none"), "plain"),
        (lambda: claim("fp8", weight_block_size=[128, 64]), "fp8-block, block 128x64, dynamic activations"),
        (lambda: claim("fp8", activation_scheme="static"), "fp8-tensor, static activations"),
        (lambda: claim("fbgemm-fp8", activation_scale_ub=1200.0), "fp8-channel, activations up to 1200.0"),
        (lambda: claim("awq", bits=4, group_size=128), "int4-awq, group 128, zero points"),
        (lambda: claim("awq", w_bit=4, q_group_size=64, zero_point=False),
         "int4-awq, group 64, no zero points"),
        (lambda: claim("gptq", bits=4, group_size=-1), "int4-gptq, symmetric"),
        (lambda: claim("gptq", bits=8, group_size=32, sym=False, desc_act=True),
         "int8-gptq, group 32, zero points, activation order"),
        (lambda: claim("auto-round", bits=4, group_size=128, packing_format="auto_round:auto_awq"),
         "int4-awq, group 128, symmetric"),
        (lambda: ct(WEIGHTS, "pack-quantized"), "int4-packed, group 32"),
        (lambda: ct({"num_bits": 8, "type": "float", "strategy": "tensor"}, "float-quantized"), "fp8-tensor"),
        (lambda: claim("modelopt", quant_algo="FP8"), "fp8-tensor, static activations"),
        (lambda: claim("modelopt", quant_algo="NVFP4"), "nvfp4"),
        (lambda: claim("quark", global_quant_config={"weight": {"dtype": "fp4", "qscheme": "per_group"}}),
         "quark-fp4, per_group"),
        (lambda: claim("mxfp4"), "mxfp4"),
        (lambda: claim("bitsandbytes", load_in_4bit=True), "bitsandbytes-4bit"),
    ],
)  # fmt: skip
def test_claims_in_words(made: Any, expected: str) -> None:
    assert str(made()) == expected


@pytest.mark.parametrize(
    ("method", "section", "left_out"),
    [
        ("fp8", {"ignored_layers": [f"{LAYER}.shared_expert"]}, SHARED),
        ("fp8", {"modules_to_not_convert": [f"{LAYER}.experts"]}, ROUTED),
        ("fbgemm-fp8", {"modules_to_not_convert": ["shared_expert"]}, SHARED),
        ("awq", {"bits": 4, "modules_to_not_convert": ["mlp.experts"]}, ROUTED),
        ("gptq", {"bits": 4, "dynamic": {"-:.*shared_expert\\..*": {}}}, SHARED),
        ("gptq", {"bits": 4, "modules_in_block_to_quantize": [["mlp.shared_expert.up_proj"]]}, ROUTED),
        ("inc", {"bits": 4, "extra_config": {SHARED: {"bits": 16}}}, SHARED),
        ("inc", {"bits": 4, "extra_config": {"shared_expert\\.": {"bits": 16}}}, SHARED),
        ("inc", {"bits": 4, "block_name_to_quantize": f"model.x, {LAYER}.experts"}, SHARED),
        ("modelopt", {"quant_algo": "FP8", "exclude_modules": ["*.shared_expert*"]}, SHARED),
        (
            "modelopt",
            {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {f"{LAYER}.experts": {"quant_algo": "FP8"}},
            },
            SHARED,
        ),
        (
            "quark",
            {"global_quant_config": {"weight": {"dtype": "fp4"}}, "exclude": ["*shared_expert*"]},
            SHARED,
        ),
        ("mxfp4", {"modules_to_not_convert": ["model.layers.*.mlp.shared_expert"]}, SHARED),
        ("bitsandbytes", {"llm_int8_skip_modules": ["shared_expert"]}, SHARED),
    ],
)
def test_lists_leave_one_side_plain_and_not_the_other(
    method: str, section: dict[str, Any], left_out: str
) -> None:
    other = ROUTED if left_out == SHARED else SHARED
    assert claim(method, left_out, **section) == PLAIN
    assert claim(method, other, **section) != PLAIN


def test_compressed_tensors_ignores_whole_names_only() -> None:
    for entry, ignored in (
        (SHARED, True),
        (f"{LAYER}.shared_expert", False),
        ("re:.*shared_expert\\..*", True),
        ("re:shared_expert", False),
    ):
        assert (ct(WEIGHTS, "pack-quantized", SHARED, ignore=[entry]) == PLAIN) is ignored


def test_gptq_overrides_are_tried_in_order() -> None:
    both = {"+:.*up_proj": {"group_size": 64}, "-:.*experts.*": {}}
    assert claim("gptq", bits=4, group_size=32, dynamic=both).group == (1, 64)
    other_way = dict(reversed(both.items()))
    assert claim("gptq", bits=4, group_size=32, dynamic=other_way) == PLAIN
    # GPTQModel's files name plain modules too, with nothing to change.
    assert claim("gptq", bits=4, group_size=32, dynamic={"lm_head": {}}).group == (1, 32)
    # How the weights came about changes nothing.
    history = {"mse": 2.4, "damp_percent": 0.05}
    assert claim("gptq", bits=4, group_size=32, dynamic={"+:.*": history}).group == (1, 32)


def test_inputs_of_fbgemm_share_a_scale_by_tokens() -> None:
    made = claim("fbgemm-fp8")
    assert (made.group, made.inputs, made.lacks) == ((1, 0), (1, 0), {"input_scale"})
    assert claim("fp8", weight_block_size=[64, 32]).inputs == (1, 32)
    assert claim("fp8").inputs == (0, 0)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({}, ""),
        ({"checkpoint_format": None, "format": None}, ""),
        ({"checkpoint_format": ""}, ""),
        ({"checkpoint_format": "gptq"}, ""),
        ({"format": "gptq"}, ""),
        ({"format": "gptq_v2"}, "gptq_v2"),
        ({"checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"checkpoint_format": "gptq_v2", "format": "gptq_v2"}, "gptq_v2"),
        ({"checkpoint_format": "gptq_v2", "format": None}, "gptq_v2"),
        ({"is_marlin_format": False}, ""),
    ],
)
def test_layout_of_gptq(section: dict[str, Any], said: str) -> None:
    expected = ("symmetric", said) if said else ("symmetric",)
    assert claim("gptq", bits=4, group_size=32, **section).details == expected


def test_defaults_of_packed_integers() -> None:
    """What a config leaves out is what engines take: symmetric, in order, one group a row."""
    bare = claim("gptq", bits=4)
    assert bare == claim("gptq", bits=4, group_size=-1, sym=True, desc_act=False, dynamic={})
    assert bare != claim("gptq", bits=4, sym=False)
    assert bare != claim("gptq", bits=4, desc_act=True)
    assert (bare.bits, bare.group) == (4, (1, 0))
    assert claim("awq", bits=4) == claim("awq", bits=4, zero_point=True, group_size=-1, version="GEMM")
    assert claim("awq", bits=4) != claim("awq", bits=4, zero_point=False)
    # transformers leaves `sym` at its default beside it.
    assert claim("awq", bits=4, sym=True) == claim("awq", bits=4, sym=False) == claim("awq", bits=4)
    assert claim("inc", bits=4) == claim("inc", bits=4, sym=True, data_type="int", act_bits=16)


def test_null_values_say_nothing() -> None:
    assert claim("fp8", weight_block_size=None, new_key=None, fmt=None) == claim("fp8")


def test_tables() -> None:
    assert len(set(FORMATS)) == len(FORMATS)
    assert set(LAYOUTS) < set(FORMATS)
    assert all(method == method.lower().replace("_", "-") for method in PARSERS)
