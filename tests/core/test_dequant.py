"""What the canary reads of FP8 checkpoints: by the definition, and nothing that is stored otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fse_patch.errors import NoReference
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.proof.canary import deviation
from fse_patch.fusion_core.proof.checkpoint_layer import InputRounding
from fse_patch.fusion_core.quant.scales import multiply

from .fp8 import SCHEMES, layer, stored, wanted

LAYOUT = ExpertLayout(8, 1, 2, 128, 64)


def test_scales_are_spread_as_the_definition_says() -> None:
    draw = torch.Generator().manual_seed(5)
    for out, inner, rows, columns in ((96, 80, 32, 32), (70, 33, 32, 16), (5, 7, 1, 0), (5, 7, 0, 0)):
        shape = [-(-out // (rows or out)), -(-inner // (columns or inner))]
        weight = torch.randn(out, inner, generator=draw, dtype=torch.float64)
        scale = torch.rand(shape, generator=draw, dtype=torch.float64)
        expected = [
            [
                float(weight[i, j] * scale[i // rows if rows else 0, j // columns if columns else 0])
                for j in range(inner)
            ]
            for i in range(out)
        ]
        assert multiply(weight, scale, (rows, columns)).tolist() == expected
    with pytest.raises(NoReference, match="scales for 96 x 80"):
        multiply(torch.ones(96, 80), torch.ones(3, 2), (32, 32))


@pytest.mark.parametrize("rounding", [(1, 0), (1, 16), (0, 0)])
def test_activations_are_rounded_by_their_own_scale(rounding: tuple[int, int]) -> None:
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = InputRounding(*rounding)(rows)
    size = rounding[1] or 40
    for i in range(3):
        for start in range(0, 40, size):
            part = rows[i, start : start + size]
            largest = (part if rounding[0] else rows).abs().max()
            # Three bits behind the leading one: half a step is 1/16 of it.
            off = (found[i, start : start + size] - part).abs() - part.abs() / 16 - largest / 448 * 2**-10
            assert float(off.max()) <= 1e-12
    assert 0.01 < deviation(found, rows) < 0.04
    assert float(InputRounding(0, 0, 0.5 / 448)(torch.ones(1, 4, dtype=torch.float64)).max()) == 0.5


def test_scales_that_random_tokens_do_not_fit_have_no_reference(tmp_path: Path) -> None:
    """Otherwise the tolerance would let everything pass."""
    decision = layer("tensor, static", LAYOUT)
    tensors = stored(decision, SCHEMES["tensor, static"], 0)
    for name in [name for name in tensors if name.endswith("down_proj.input_scale")]:
        tensors[name] = tensors[name] / 50
    with pytest.raises(NoReference, match="rounding to FP8 alone may change"):
        wanted(tmp_path, decision, "tensor, static", tensors)
