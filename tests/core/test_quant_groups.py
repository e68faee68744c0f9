"""Groups of compressed-tensors: which one a module belongs to, and what in them is not understood."""

from __future__ import annotations

from typing import Any

import pytest

from fse_patch.fusion_core.quant.claims import PLAIN, Doubt

from .test_quant_claims import ROUTED, SHARED, WEIGHTS, claim, doubt_of, linear


def groups(*targets: str) -> dict[str, Any]:
    """Groups of one target each; the first has groups of 32 columns, the next of 64, ..."""
    made = {
        f"group_{n}": {"targets": [target], "weights": {**WEIGHTS, "group_size": 32 << n}}
        for n, target in enumerate(targets)
    }
    return {"format": "pack-quantized", "config_groups": made}


@pytest.mark.parametrize("specific", ["re:.*experts.*", ROUTED])
@pytest.mark.parametrize("turned", [False, True])
def test_a_name_or_a_regex_comes_before_a_class(specific: str, turned: bool) -> None:
    section = groups(*(("Linear", specific) if not turned else (specific, "Linear")))
    routed, shared = (claim("compressed-tensors", name, **section).group[1] for name in (ROUTED, SHARED))
    assert (routed, shared) == ((32, 64) if turned else (64, 32))


@pytest.mark.parametrize(
    "targets", [("Linear", "Linear"), ("re:.*", "re:.*experts.*"), (ROUTED, "re:.*experts.*")]
)
def test_two_groups_for_one_module_are_a_doubt(targets: tuple[str, str]) -> None:
    with pytest.raises(Doubt, match="two config groups"):
        claim("compressed-tensors", ROUTED, **groups(*targets))
    # Control: they may say the same.
    same = {"format": "pack-quantized", "config_groups": {
        label: {"targets": [target], "weights": WEIGHTS} for label, target in zip("ab", targets, strict=True)
    }}  # fmt: skip
    assert claim("compressed-tensors", ROUTED, **same).group == (1, 32)


@pytest.mark.parametrize("engines", ["RoutedExperts", "FusedMoE"])
def test_an_engines_class_of_routed_experts_must_say_what_linear_says(engines: str) -> None:
    section = groups("Linear", engines)
    assert claim("compressed-tensors", SHARED, **section).group == (1, 32)
    with pytest.raises(Doubt, match="two config groups"):
        claim("compressed-tensors", ROUTED, **section)
    assert claim("compressed-tensors", ROUTED, **groups(engines)).group == (1, 32)
    assert claim("compressed-tensors", SHARED, **groups(engines)) == PLAIN


def test_a_group_of_other_modules_is_not_read() -> None:
    section = groups("Linear", "re:.*self_attn.*")
    section["config_groups"]["group_1"]["weights"] = {"num_bits": 6, "type": "float"}
    assert claim("compressed-tensors", ROUTED, **section).group == (1, 32)
    # Control: a module that it names.
    section["config_groups"]["group_1"]["targets"] = ["re:.*experts.*"]
    with pytest.raises(Doubt, match="6 bits"):
        claim("compressed-tensors", ROUTED, **section)


FP8: dict[str, Any] = {"num_bits": 8, "type": "float"}
INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "channel"}
SPARSE = "transforms and sparsity are not known"


def scheme(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    return {**linear(weights), "format": form}


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"new_key": 1}, "the key 'new_key' is not known"),
    ({"transform_config": {"a": 1}}, SPARSE),
    ({"sparsity_config": {"format": "sparse-24-bitmask"}}, SPARSE),
    ({"sparsity_config": {"format": "dense", "targets": ["Linear"]}}, "sparsity is not known"),
    ({"sparsity_config": {"targets": [3]}}, "'targets' holds 3, which is no name"),
    ({"sparsity_config": 3}, "'sparsity_config' is 3, no object"),
    ({"format": "nvfp4-pack-quantized"}, "it packs FP4, and no group says of what"),
    ({"config_groups": [3]}, "'config_groups' is [3], no object"),
    ({"config_groups": {"a": 3}}, "'a' is 3, no object"),
    ({"config_groups": {"a": {"weights": WEIGHTS}}}, "'config_groups.a' has no 'targets'"),
    ({"config_groups": {"a": {"colour": 1}}}, "the key 'config_groups.a.colour' is not known"),
    ({"config_groups": {"a": {"targets": [3]}}}, "'targets' holds 3, which is no name"),
    (linear(WEIGHTS) | {"quantization_status": "calibration"},
     "'quantization_status' is 'calibration', which is not known"),
    (linear(WEIGHTS) | {"ignore": [3]}, "'ignore' holds 3, which is no name"),
    (linear(WEIGHTS) | {"ignore": ["re:(a+)+$"]}, "the regex '(a+)+$' could take too long"),
    (linear({**WEIGHTS, "new_key": 1}), "the key 'weights.new_key' is not known"),
    (linear(WEIGHTS, input_activations={"new_key": 1}),
     "the key 'input_activations.new_key' is not known"),
    (linear(WEIGHTS, output_activations={"num_bits": 8}), "quantised output activations are not known"),
    (linear(None, input_activations={"num_bits": 8}),
     "quantised activations beside plain weights are not known"),
    (linear({**WEIGHTS, "actorder": "odd"}), "'actorder' is 'odd', which is not known"),
    (linear({**WEIGHTS, "symmetric": 1}), "'symmetric' is 1, neither true nor false"),
    (linear({**WEIGHTS, "group_size": 0}), "'group_size' is 0, no whole number from 1"),
    (linear({**WEIGHTS, "num_bits": None}), "'num_bits' is None, no whole number from 0"),
    (linear({"num_bits": 2}), "int weights of 2 bits by no strategy in 'pack-quantized' are not known"),
    (linear({**WEIGHTS, "num_bits": 6}),
     "int weights of 6 bits by group in 'pack-quantized' are not known"),
    (linear({**WEIGHTS, "strategy": "tensor"}),
     "int weights of 4 bits by tensor in 'pack-quantized' are not known"),
    (linear({**WEIGHTS, "type": "float"}),
     "float weights of 4 bits by group in 'pack-quantized' are not known"),
    (scheme("dense", WEIGHTS), "int weights of 4 bits by group in 'dense' are not known"),
    (scheme("int-quantized", WEIGHTS), "int weights of 4 bits by group in 'int-quantized' are not known"),
    (scheme("int-quantized", {**INT8, "strategy": "tensor"}),
     "int weights of 8 bits by tensor in 'int-quantized' are not known"),
    *(
        (scheme("int-quantized", {**INT8, **change}),
         "int weights of 8 bits by channel in 'int-quantized' are not known")
        for change in ({"symmetric": False}, {"actorder": "group"})
    ),
    (scheme("float-quantized", FP8),
     "float weights of 8 bits by no strategy in 'float-quantized' are not known"),
    (scheme("float-quantized", {**FP8, "strategy": "token"}),
     "float weights of 8 bits by token in 'float-quantized' are not known"),
    *(
        (scheme("float-quantized", {**FP8, "strategy": "channel", **change}),
         "float weights of 8 bits by channel in 'float-quantized' are not known")
        for change in ({"symmetric": False}, {"actorder": "group"})
    ),
    *(
        (scheme("float-quantized", {**FP8, "strategy": "block", "block_structure": block}), words)
        for block, words in (
            (None, "'block_structure' is None, no two sizes"),
            ("ab", "'block_structure' is 'ab', no two sizes"),
            ([128], "'block_structure' is [128], no two sizes"),
            ([0, 128], "'rows' is 0, no whole number from 1"),
            ([128, 0], "'columns' is 0, no whole number from 1"),
        )
    ),
    *(
        (linear(WEIGHTS, input_activations={"num_bits": 8, **change}), words)
        for change, words in (
            ({"dynamic": "often"}, "'dynamic' is 'often', neither true nor false"),
            ({"num_bits": None}, "'num_bits' is None, no whole number from 0"),
            ({"type": 3}, "'type' is 3, which is not known"),
            ({"strategy": 3}, "'strategy' is 3, which is not known"),
            ({"type": "float", "group_size": -2}, "'group_size' is -2, no whole number from -1"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("section", "words"), REFUSALS)
def test_what_is_not_understood_is_a_doubt(section: dict[str, Any], words: str) -> None:
    assert doubt_of("compressed-tensors", section) == words
