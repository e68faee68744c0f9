"""Layouts of 4-bit experts that a setting can bring are refused, each with its reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fse_patch.fusion_core.quant.built_int4 import BuiltInt4, refusal

FINE = BuiltInt4("marlin", "bfloat16", "bfloat16", "bfloat16", False, 512, 128)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"packing": "humming"},
        {"packing": "bytes", "width": 128},
        {"packing": "humming", "width": 128},
        {"group": 0},
        {"width": 256},
        {"activations": "float16", "model": "float16", "scales": "float16"},
    ],
    ids=str,
)
def test_what_the_kernels_read(changes: dict[str, Any]) -> None:
    assert refusal(replace(FINE, **changes)) is None


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"activations": "int8"}, "quant.layout", "VLLM_MARLIN_INPUT_DTYPE"),
        ({"activations": "float8_e4m3fn"}, "quant.layout", "float8_e4m3fn"),
        ({"packing": "humming", "activations": "int8"}, "quant.layout", "VLLM_HUMMING_INPUT_QUANT_CONFIG"),
        ({"act_order": True}, "quant.layout", "g_idx"),
        ({"scales": "float16"}, "quant.layout", "scales are in float16"),
        ({"activations": "float16"}, "quant.layout", "multiplies in float16"),
        ({"width": 128}, "upstream.wrong", "50196"),
        ({"width": 64}, "upstream.wrong", "group of 128"),
    ],
    ids=str,
)
def test_what_they_do_not_read(changes: dict[str, Any], code: str, words: str) -> None:
    reason = refusal(replace(FINE, **changes))
    assert reason is not None
    assert reason.code == code
    assert words in reason.detail
