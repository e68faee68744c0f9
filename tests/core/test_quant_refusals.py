"""What is not understood in a quantisation config is refused, and the words say what it is."""

from __future__ import annotations

from typing import Any

import pytest

from fse_patch.fusion_core.checkpoint.config import QuantConfig
from fse_patch.fusion_core.quant.claims import Doubt
from fse_patch.fusion_core.quant.methods import resolver_for

from .test_quant_claims import ROUTED, SHARED, doubt_of

Section = dict[str, Any]
Rows = list[tuple[Section, str]]


def of_auto_round(**base: Any) -> Rows:
    """What auto-round may have written into the configs of several methods."""
    return [
        ({**base, "act_bits": 8}, "quantised activations are not known"),
        ({**base, "act_bits": 15}, "quantised activations are not known"),
        ({**base, "act_bits": "8"}, "'act_bits' is '8', no whole number from 0"),
        ({**base, "data_type": "mx_fp"}, "'data_type' is 'mx_fp', which is not known"),
        *of_other_modules(**base),
    ]


def of_other_modules(**base: Any) -> Rows:
    keys = ("static_attention_granularity", "static_kv_granularity")
    return [
        ({**base, "rotation_config": {"type": "hadamard"}}, "a rotation is not known"),
        ({**base, "rotation_config": "hadamard"}, "'rotation_config' is 'hadamard', no object"),
        *(({**base, key: "expert"}, f"'{key}' is 'expert', which is not known") for key in keys),
    ]


def of_gptqmodel(method: str, other: str) -> Rows:
    """What GPTQModel may have written into the configs of GPTQ and AWQ."""
    said = f"'method' is '{other}', 'quant_method' '{method}'"
    changes: Rows = [
        ({"colour": 1}, "the key 'dynamic.+:.*.colour' is not known"),
        ({"bits": 3}, "3 bits in groups of -1 are not known"),
        ({"group_size": 0}, "4 bits in groups of 0 are not known"),
    ]
    return [
        ({"bits": 4, "method": other}, said),
        ({"bits": 4, "method": 4}, "'method' is 4, which is not known"),
        ({"bits": 4, "pack_dtype": "int16"}, "'pack_dtype' is 'int16', which is not known"),
        ({"bits": 4, "dynamic": [3]}, "'dynamic' is [3], no object"),
        ({"bits": 4, "dynamic": {"+:.*": 3}}, "'+:.*' is 3, no object"),
        ({"bits": 4, "dynamic": {"+:(a+)+$": {}}}, "the regex '(a+)+$' could take too long"),
        ({"bits": 4, "dynamic": {"-:(a+)+$": {}}}, "the regex '(a+)+$' could take too long"),
        (
            {"bits": 4, "dynamic": {f"-:.*a.*b{n}": {} for n in range(1000)}},
            "the regexes from '.*a.*b0' on could take too long",
        ),
        *(({"bits": 4, "dynamic": {"+:.*": change}}, words) for change, words in changes),
    ]


FP8_ONLY = "FP8 of other than 8 bits, or with zero points, is not known"
BLOCKS_ONLY = "'act_bits' and 'group_size' say something else than FP8 in blocks"
BOTH_SIZES = "it names a block size and one scale a tensor"
AWQ_ORDER = "activation order and the layout of llm-awq are not known"
BEFORE = "scales before quantisation and zero points are not known"
NO_ALGORITHM = "layers are quantised without a 'quant_algo'"
REFUSALS: dict[str, Rows] = {
    "brand-new": [({}, "nothing is known of quant_method 'brand-new'")],
    "fp8": [
        ({"new_key": 1}, "the key 'new_key' is not known"),
        ({"fmt": "e5m2"}, "'fmt' is 'e5m2', which is not known"),
        ({"scale_fmt": "e8m1"}, "'scale_fmt' is 'e8m1', which is not known"),
        ({"activation_scheme": "sometimes"}, "'activation_scheme' is 'sometimes', which is not known"),
        ({"expert_dtype": "fp4"}, "'expert_dtype' is 'fp4', which is not known"),
        ({"weight_block_size": [128, 128], "weight_per_tensor": True}, BOTH_SIZES),
        ({"weight_block_size": [128, 128], "act_per_tensor": True}, BOTH_SIZES),
        ({"ignored_layers": [3]}, "'ignored_layers' holds 3, which is no name"),
        ({"modules_to_not_convert": {"a": 1}}, "'modules_to_not_convert' holds {'a': 1}, which is no name"),
        ({"modules_to_convert": [3]}, "'modules_to_convert' holds 3, which is no name"),
        (
            {"modules_to_convert": ["up_proj"], "ignored_layers": ["up_proj"]},
            f"{ROUTED} is to be converted, and is not",
        ),
        ({"bits": 4}, FP8_ONLY),
        ({"bits": 16}, FP8_ONLY),
        ({"sym": False}, FP8_ONLY),
        ({"act_bits": 16}, BLOCKS_ONLY),
        ({"group_size": 32, "weight_block_size": [32, 32]}, BLOCKS_ONLY),
        ({"group_size": 1}, BLOCKS_ONLY),
        ({"data_type": "int"}, "'data_type' is 'int', which is not known"),
        ({"extra_config": {"x": {"act_dynamic": False}}}, "'extra_config' changes x"),
        ({"extra_config": {"x": {"bits": 16}, "y": {"bits": 15}}}, "'extra_config' changes y"),
        ({"extra_config": {"x": 3}}, "'x' is 3, no object"),
        *of_other_modules(),
    ],
    "fbgemm-fp8": [
        ({"new_key": 1}, "the key 'new_key' is not known"),
        ({"ignored_layers": [3]}, "'ignored_layers' holds 3, which is no name"),
        ({"modules_to_not_convert": 3}, "'modules_to_not_convert' holds 3, which is no name"),
    ],
    "awq": [
        ({"bits": 3}, "3 bits in groups of -1 are not known"),
        ({"w_bit": 2, "q_group_size": 64}, "2 bits in groups of 64 are not known"),
        ({}, "'w_bit' is None, no whole number from 0"),
        ({"bits": 4, "group_size": 0}, "4 bits in groups of 0 are not known"),
        ({"bits": 4, "group_size": -2}, "'group_size' is -2, no whole number from -1"),
        ({"bits": 4, "group_size": "128"}, "'group_size' is '128', no whole number from -1"),
        *(
            ({"bits": 4, key: "gemv"}, f"'{key}' is 'gemv', which is not known")
            for key in ("version", "format", "checkpoint_format")
        ),
        ({"bits": 4, "zero_point": 1}, "'zero_point' is 1, neither true nor false"),
        ({"bits": 4, "backend": "LLM-AWQ"}, AWQ_ORDER),
        ({"bits": 4, "desc_act": True}, AWQ_ORDER),
        ({"bits": 4, "modules_to_not_convert": [3]}, "'modules_to_not_convert' holds 3, which is no name"),
        (
            {"bits": 4, "modules_in_block_to_quantize": [["mlp.gate_proj"]]},
            "the key 'modules_in_block_to_quantize' is not known",
        ),
        (
            {"bits": 4, "dynamic": {"+:.*": {"zero_point": False}}},
            "the key 'dynamic.+:.*.zero_point' is not known",
        ),
        *of_gptqmodel("awq", "gptq"),
        *of_auto_round(bits=4),
    ],
    "gptq": [
        ({"bits": 4, "checkpoint_format": "marlin"}, "'checkpoint_format' is 'marlin', which is not known"),
        ({"bits": 4, "format": "marlin"}, "'format' is 'marlin', which is not known"),
        ({"bits": 4, "format": 3}, "'format' is 3, which is not known"),
        (
            {"bits": 4, "checkpoint_format": "gptq", "format": "gptq_v2"},
            "'checkpoint_format' is 'gptq', 'format' 'gptq_v2'",
        ),
        ({"bits": 4, "is_marlin_format": True}, "'is_marlin_format' is true, which is not known"),
        ({"bits": 4, "is_marlin_format": 1}, "'is_marlin_format' is 1, neither true nor false"),
        ({"bits": 4, "sym": "yes"}, "'sym' is 'yes', neither true nor false"),
        ({"bits": 4, "desc_act": "no"}, "'desc_act' is 'no', neither true nor false"),
        ({"bits": 4, "activation": {"mode": "w4afp8"}}, "the key 'activation' is not known"),
        ({"bits": 4, "rotation": "hadamard"}, "the key 'rotation' is not known"),
        (
            {"bits": 4, "modules_in_block_to_quantize": [[3]]},
            "'modules_in_block_to_quantize' holds 3, which is no name",
        ),
        *of_gptqmodel("gptq", "awq"),
        *of_auto_round(bits=4),
    ],
    "inc": [
        ({"bits": 4, "new_key": 1}, "the key 'new_key' is not known"),
        ({}, "'bits' is None, no whole number from 0"),
        ({"bits": 4, "sym": 1}, "'sym' is 1, neither true nor false"),
        (
            {"bits": 4, "packing_format": "auto_round:LLM_compressor"},
            "'packing_format' 'auto_round:llm_compressor' is not known",
        ),
        ({"bits": 4, "block_name_to_quantize": 3}, "'block_name_to_quantize' holds 3, which is no name"),
        ({"bits": 4, "to_quant_block_names": [3]}, "'to_quant_block_names' holds 3, which is no name"),
        ({"bits": 4, "extra_config": [3]}, "'extra_config' is [3], no object"),
        ({"bits": 4, "extra_config": {"x": 3}}, "'x' is 3, no object"),
        ({"bits": 4, "extra_config": {"x": {"colour": 1}}}, "the key 'extra_config.x.colour' is not known"),
        ({"bits": 4, "extra_config": {"x": {"act_bits": 8}}}, "quantised activations are not known"),
        ({"bits": 4, "extra_config": {"(a+)+$": {}}}, "the regex '(a+)+$' could take too long"),
        (
            {"bits": 4, "extra_config": {f".*a.*b{n}": {} for n in range(1000)}},
            "the regexes from '.*a.*b0' on could take too long",
        ),
        ({"bits": 16, "act_bits": 8}, "quantised activations are not known"),
        ({"bits": 15}, "15 bits in groups of -1 are not known"),
        *of_auto_round(bits=4),
    ],
    "modelopt": [
        ({"new_key": 1}, "the key 'new_key' is not known"),
        ({"quant_algo": "W4A8_AWQ"}, "'quant_algo' is 'W4A8_AWQ', which is not known"),
        ({"quant_algo": "FP8", "pre_quant_scale": True}, BEFORE),
        ({"quant_algo": "FP8", "has_zero_point": True}, BEFORE),
        ({"quantized_layers": {"a": {"quant_algo": "FP8"}}}, NO_ALGORITHM),
        ({"config_groups": {"a": {"targets": ["Linear"]}}}, NO_ALGORITHM),
        ({"quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION without 'quantized_layers'"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": [3]}, "'quantized_layers' is [3], no object"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": 3}}, "'a' is 3, no object"),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {}}},
            "'quant_algo' is '', which is not known",
        ),
        (
            {"quant_algo": "FP8", "exclude_modules": ["*a*b*c*d"]},
            "the pattern '*a*b*c*d' has too many wildcards",
        ),
        ({"quant_algo": "FP8", "ignore": [3]}, "'ignore' holds 3, which is no name"),
    ],
    "mxfp4": [
        ({"modules_to_not_convert": [3]}, "'modules_to_not_convert' holds 3, which is no name"),
        ({"ignored_layers": [3]}, "'ignored_layers' holds 3, which is no name"),
    ],
    "quark": [
        ({"exclude": [3]}, "'exclude' holds 3, which is no name"),
        ({"layer_type_quant_config": {"a": 1}}, "'layer_type_quant_config' is not known"),
        ({"layer_type_quant_config": 3}, "'layer_type_quant_config' is 3, no object"),
        ({"global_quant_config": 3}, "'global_quant_config' is 3, no object"),
        ({"layer_quant_config": 3}, "'layer_quant_config' is 3, no object"),
        ({"layer_quant_config": {"a": 3}}, "'a' is 3, no object"),
    ],
    "bitsandbytes": [
        ({"llm_int8_skip_modules": [3]}, "'llm_int8_skip_modules' holds 3, which is no name"),
        ({"load_in_4bit": 1}, "'load_in_4bit' is 1, neither true nor false"),
        ({"_load_in_4bit": 1}, "'_load_in_4bit' is 1, neither true nor false"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "section", "words"),
    [(method, section, words) for method, rows in REFUSALS.items() for section, words in rows],
)
def test_what_is_not_understood_is_a_doubt(method: str, section: Section, words: str) -> None:
    assert doubt_of(method, section) == words


def test_a_doubt_names_the_file() -> None:
    quant = QuantConfig("modelopt", source="hf_quant_config.json", section={"new_key": 1})
    with pytest.raises(Doubt) as doubt:
        resolver_for([quant])
    assert str(doubt.value) == "hf_quant_config.json: the key 'new_key' is not known"


def test_declarations_must_agree() -> None:
    one = QuantConfig("modelopt", source="a", section={"quant_algo": "FP8", "ignore": ["lm_head"]})
    other = QuantConfig("modelopt", source="b", section={"quant_algo": "FP8", "exclude_modules": [SHARED]})
    for quants, words in (
        ([one, other], f"a says fp8-tensor, static activations of {SHARED}, b plain"),
        ([one, one, other], f"a says fp8-tensor, static activations of {SHARED}, b plain"),
        ([other, one], f"b says plain of {SHARED}, a fp8-tensor, static activations"),
    ):
        resolve = resolver_for(quants)
        assert resolve(ROUTED).format == "fp8-tensor"
        with pytest.raises(Doubt) as doubt:
            resolve(SHARED)
        assert str(doubt.value) == words
