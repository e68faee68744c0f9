"""The head in 8 bits: every row of it, against float64; a scale or a row in the wrong place shows."""

from __future__ import annotations

import pytest
import torch

from fse_patch.fusion_core.kernels import head_int8
from fse_patch.fusion_core.quant.int8_groups import quantised

from .test_kernels import DEVICE, draw, off

# Tokens, rows, columns: full tiles, a tile that is cut in rows, and in columns, and both.
SHAPES = [(1, 128, 256), (4, 130, 128), (16, 64, 96), (5, 77, 160), (2, 1, 32)]
LIMITS = {torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, rows, columns = shape
    held = quantised(draw(rows, columns, seed=1, dtype=dtype, scale=0.05))
    states = draw(tokens, columns, seed=2, dtype=dtype)
    got = head_int8.head_logits(states, held.values, held.scales)
    wanted = head_int8.reference(states, held.values, held.scales)
    assert got.dtype == dtype
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    assert off(got, wanted) < LIMITS[dtype]
    # The control: one group's scale doubled.
    scales = held.scales.clone()
    scales[rows // 2, columns // 32 - 1] *= 2
    fault = head_int8.head_logits(states, held.values, scales)
    changed = (fault.double() - wanted).norm(dim=0) / wanted.norm(dim=0)
    assert changed[rows // 2] > 0.05
    assert float(changed.sum() - changed[rows // 2]) < 0.01 * rows


def test_rows_of_states_need_not_touch() -> None:
    held = quantised(draw(70, 64, seed=1, dtype=torch.bfloat16))
    states = draw(3, 128, seed=2, dtype=torch.bfloat16)[:, :64]
    got = head_int8.head_logits(states, held.values, held.scales)
    assert off(got, head_int8.reference(states, held.values, held.scales)) < LIMITS[torch.bfloat16]


def test_more_tokens_than_a_call_takes() -> None:
    held = quantised(draw(4, 32, seed=1, dtype=torch.bfloat16))
    with pytest.raises(AssertionError):
        head_int8.head_logits(torch.zeros(17, 32, device=DEVICE).bfloat16(), held.values, held.scales)
