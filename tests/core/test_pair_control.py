"""The control of `verify` on paired layers: where the pass reads, so that graphs see it, and undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fse_patch.adapters import paired
from fse_patch.fusion_core.forward.paired import PairedWeights
from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights, Scales
from fse_patch.lab import model_process, slot_control

from .paired_roles import role_of

HIDDEN, WIDTH, SLOTS = 8, 4, 2


def weights(count: int, width: int, fp8: bool = False) -> ExpertWeights:
    """Draw experts; in FP8 with scales for blocks of 4 x 4."""
    w13, w2 = torch.rand(count, 2 * width, HIDDEN), torch.rand(count, HIDDEN, width)
    if not fp8:
        return ExpertWeights(w13, w2)
    scales = Scales(
        torch.rand(count, 2 * width // 4, HIDDEN // 4), torch.rand(count, HIDDEN // 4, width // 4), (4, 4)
    )
    return ExpertWeights(w13.to(torch.float8_e4m3fn), w2.to(torch.float8_e4m3fn), scales)


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_of_the_first_slot(fp8: bool) -> None:
    def factors(held: ExpertWeights) -> torch.Tensor:
        return held.w2 if held.scales is None else held.scales.w2

    apart = PairedWeights(weights(3, WIDTH, fp8), weights(1, SLOTS * WIDTH, fp8))
    assert apart.shared is not None
    first = WIDTH // 4 if fp8 else WIDTH
    rows = slot_control.pair_rows(apart)
    assert rows is not None
    assert torch.equal(rows, factors(apart.shared)[:, :, :first])
    assert rows.data_ptr() == factors(apart.shared).data_ptr()
    merged = PairedWeights(weights(3 + SLOTS, WIDTH, fp8), None, merged_slots=SLOTS)
    rows = slot_control.pair_rows(merged)
    assert rows is not None
    assert torch.equal(rows, factors(merged.routed)[3:4])


def test_memory_has_the_factor_on_a_gpu_and_the_layer_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    role = role_of()
    monkeypatch.setattr(paired, "constructed", lambda: [role])
    layers: list[Any] = list(role.layers.values())
    before = [slot_control.pair_rows(layer.read()).clone() for layer in layers]  # type: ignore[union-attr]

    def in_memory() -> list[bool]:
        rows = [slot_control.pair_rows(layer.read()) for layer in layers]
        return [torch.equal(now, old) for now, old in zip(rows, before, strict=True)]  # type: ignore[arg-type]

    def in_layers() -> list[float]:
        return [layer.layer.control_factor for layer in layers]

    model_process.control(0.5)
    assert (in_memory(), in_layers()) == ([True, True], [0.5, 0.5])
    monkeypatch.setattr(slot_control, "on_gpu", lambda _: True)
    model_process.control(0.5)
    assert (in_memory(), in_layers()) == ([False, False], [1.0, 1.0])
    model_process.control(1.0)
    assert (in_memory(), in_layers()) == ([True, True], [1.0, 1.0])
