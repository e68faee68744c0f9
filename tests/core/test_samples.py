"""Rows of loaded slots against the checkpoint's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fse_patch.errors import AuditError
from fse_patch.fusion_core.families import family_of
from fse_patch.fusion_core.layout import ExpertLayout
from fse_patch.fusion_core.naming import TensorNaming
from fse_patch.fusion_core.samples import SlotSamples
from fse_patch.fusion_core.tensors import CheckpointTensors

from .moe import decision
from .test_canary import save

LAYOUT = ExpertLayout(4, 3, 2, 16, 8)
NAME = "model.layers.{}.mlp.shared_expert.{}_proj.weight"
Held = tuple[torch.Tensor, torch.Tensor]


def shapes(layout: ExpertLayout) -> dict[str, tuple[int, int]]:
    wide, hidden = layout.shared_intermediate_size, layout.hidden_size
    return {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    held = {NAME.format(n, p): torch.randn(s).to(request.param) for n in (0, 1) for p, s in shapes(LAYOUT).items()}
    save(tmp_path / "model.safetensors", held)
    return tmp_path, held


def samples(folder: Path, rank: int = 0, ranks: int = 1) -> SlotSamples:
    family = family_of("qwen2_moe")
    assert family is not None
    made = decision(LAYOUT, layers=(0, 1))
    return SlotSamples(CheckpointTensors(folder), TensorNaming(family, 2), made, rank, ranks)


def loaded(held: dict[str, torch.Tensor], layer: int, rank: int = 0, ranks: int = 1) -> Held:
    """The fused parameters of a layer, with 0 for the routed experts, written with loops."""
    width = LAYOUT.moe_intermediate_size // ranks
    gate, up, down = (held[NAME.format(layer, p)] for p in ("gate", "up", "down"))
    w13 = torch.zeros(LAYOUT.num_experts, 2 * width, LAYOUT.hidden_size).to(gate.dtype)
    w2 = torch.zeros(LAYOUT.num_experts, LAYOUT.hidden_size, width).to(gate.dtype)
    for part, slot in enumerate(LAYOUT.shared_slots):
        for row in range(width):
            place = part * LAYOUT.moe_intermediate_size + rank * width + row
            w13[slot, row], w13[slot, width + row] = gate[place], up[place]
            w2[slot, :, row] = down[:, place]
    return w13, w2


Stored = tuple[Path, dict[str, torch.Tensor]]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_right_passes(stored: Stored, ranks: int) -> None:
    for layer in (0, 1):
        for rank in range(ranks):
            assert samples(stored[0], rank, ranks).compare(layer, *loaded(stored[1], layer, rank, ranks))


def test_the_shard_of_another_rank_is_seen(stored: Stored) -> None:
    with pytest.raises(AuditError, match="layer 0 slot 4 does not hold what the checkpoint says"):
        samples(stored[0], 1, 2).compare(0, *loaded(stored[1], 0, 0, 2))


def test_another_layer_is_seen(stored: Stored) -> None:
    with pytest.raises(AuditError, match="layer 1 slot 4"):
        samples(stored[0]).compare(1, *loaded(stored[1], 0))


@pytest.mark.parametrize("slot", LAYOUT.shared_slots)
@pytest.mark.parametrize("part", ["w1", "w3", "w2"])
def test_every_part_of_every_slot_counts(stored: Stored, slot: int, part: str) -> None:
    w13, w2 = loaded(stored[1], 0)
    rows = {"w1": w13[slot, :8], "w3": w13[slot, 8:], "w2": w2[slot]}[part]
    rows.copy_(rows.float().mul(2).to(rows.dtype))
    with pytest.raises(AuditError, match=f"slot {slot} "):
        samples(stored[0]).compare(0, w13, w2)


def test_a_wider_dtype_is_compared_as_the_engine_rounds(stored: Stored) -> None:
    w13, w2 = (w.to(torch.bfloat16) for w in loaded(stored[1], 0))
    assert samples(stored[0]).compare(0, w13, w2)


def test_what_does_not_lie_as_in_a_checkpoint_is_not_compared(stored: Stored) -> None:
    w13, w2 = loaded(stored[1], 0)
    assert not samples(stored[0]).compare(0, w13[:, :12], w2)
    assert not samples(stored[0]).compare(7, w13, w2)
