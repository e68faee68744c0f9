"""One tensor of a shared expert becomes its slots' tensors: weights, scales and what does not divide."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fse_patch.errors import AuditError
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.weights.remap import SlotTensor, split

H, I, E = 6, 4, 3  # noqa: E741


def layout(slots: int) -> ExpertLayout:
    return ExpertLayout(E, slots, 2, H, I)


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("slots", [1, 2, 4])
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_parts_lie_side_by_side(projection: str, slots: int, size: int, other: int, bare: bool) -> None:
    """Weights [S*I, H] or [H, S*I], block scales of any block, and 1-D tensors of gate and up."""
    down = projection == "down_proj"
    shape = (slots * size,) if bare and not down else (other, slots * size) if down else (slots * size, other)
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    parts = split(whole, projection, layout(slots))  # type: ignore[arg-type]
    assert len(parts) == slots
    if whole.numel() == 1:
        assert all(torch.equal(p, whole) for p in parts)
        return
    assert torch.equal(torch.cat(parts, dim=1 if down else 0), whole)
    assert len({p.shape for p in parts}) == 1
    assert all(p.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for p in parts)


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_is_the_same_for_every_slot(projection: str, shape: tuple[int, ...]) -> None:
    scale = torch.full(shape, 0.5)
    assert all(p is scale for p in split(scale, projection, layout(4)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("projection", "shape"),
    [("down_proj", (H,)), ("down_proj", (H, 1)), ("gate_proj", (1, H)), ("up_proj", (1, H))],
)
def test_a_tensor_without_the_intermediate_dimension_is_the_same_for_every_slot(
    projection: str, shape: tuple[int, ...]
) -> None:
    scale = torch.randn(shape)
    assert all(p is scale for p in split(scale, projection, layout(2)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("projection", "shape"),
    [("gate_proj", (6, H)), ("up_proj", (6,)), ("down_proj", (H, 6)), ("gate_proj", (3, 2))],
)
def test_what_does_not_divide_is_refused(projection: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(AuditError, match=f"{projection} of shape .* does not split into 4 slots"):
        split(torch.zeros(shape), projection, layout(4))  # type: ignore[arg-type]


def test_control_the_same_shape_divides_into_fewer() -> None:
    assert [p.shape for p in split(torch.zeros(6, H), "gate_proj", layout(2))] == [(3, H), (3, H)]


@pytest.mark.parametrize(
    ("shard", "name"),
    [("w1", "w13_weight_scale_inv"), ("w3", "w13_weight_scale_inv"), ("w2", "w2_weight_scale_inv")],
)
def test_parameter_names(shard: str, name: str) -> None:
    assert SlotTensor(0, E, shard, "weight_scale_inv", torch.zeros(1)).parameter == name  # type: ignore[arg-type]
