"""Quantisation that an engine makes while it loads, by its argument or by itself, is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fse_patch.adapters.refusals import quantised_online
from fse_patch.fusion_core.checkpoint.config import UNQUANTISED
from fse_patch.fusion_core.quant.methods import PARSERS, READERS

from .moe import stored_as

BUILT = SimpleNamespace()


@pytest.mark.parametrize(
    ("declared", "running", "refused"),
    [
        ("none", None, False),
        ("none", "unquant", False),
        ("none", "fp8", True),
        ("none", "fp8_per_tensor", True),
        ("none", "bitsandbytes", True),
        ("fp8", "fp8", False),
        ("fp8", None, False),
        ("fp8", "fp8_per_tensor", True),
        ("fp8", "mxfp8", True),
        # SGLang makes FP4 of FP8 checkpoints under these names.
        ("fp8", "modelopt_fp4", True),
        ("fp8", "nvfp4_online", True),
        ("modelopt", "modelopt_fp4", True),
        ("modelopt", "modelopt_fp8", False),
        ("modelopt", "modelopt", False),
        ("modelopt-fp4", "modelopt_fp4", False),
        ("modelopt-fp4", "modelopt", True),
        ("compressed-tensors", "compressed-tensors", False),
        ("compressed-tensors", "compressed_tensors", False),
        ("compressed-tensors", "w8a8_fp8", True),
        ("awq", "awq_marlin", False),
        ("awq", "auto_awq", False),
        ("awq", "moe_wna16", True),
        ("awq", "gptq_marlin", True),
        ("gptq", "gptq_marlin", False),
        ("gptq", "awq", True),
        ("auto-round", "inc", False),
        ("inc", "auto-round", False),
        ("fbgemm-fp8", "fbgemm_fp8", False),
        ("fbgemm-fp8", "fp8", True),
        ("fp8", "FP8", False),
        ("fp8", "unquant", True),
    ],
)
def test_what_does_not_match_the_checkpoint_is_refused(
    declared: str, running: str | None, refused: bool
) -> None:
    built = None if declared == "none" and running in (None, "unquant") else BUILT
    found = list(quantised_online(stored_as(declared, ("fp8-block",)), running, built))
    assert [reason.code for reason in found] == ["quant.online"] * refused
    if refused and declared != "none":
        assert f"is {declared} and would be run as {running}" in found[0].detail


def test_an_engine_that_quantises_without_a_name_is_refused() -> None:
    (reason,) = quantised_online(stored_as("none", ("plain",)), None, BUILT)
    assert (reason.code, "by an argument" in reason.detail) == ("quant.online", True)


def test_every_method_that_is_read_has_its_own_name() -> None:
    """The table names methods that have a parser, and each by its own name too, but for spellings of one."""
    assert READERS.keys() <= PARSERS.keys()
    for method in PARSERS.keys() - {"autoround", "intel/auto-round"}:
        built = None if method == UNQUANTISED else BUILT
        assert list(quantised_online(stored_as(method, ("plain",)), method, built)) == []
