"""Which group of compressed-tensors a module belongs to."""

from __future__ import annotations

from typing import Any

import pytest

from fse_patch.fusion_core.quant.claims import PLAIN, Doubt

from .test_quant_claims import ROUTED, SHARED, WEIGHTS, claim


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
