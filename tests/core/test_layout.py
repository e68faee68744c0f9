"""ExpertLayout: slot numbers and widths add up for every size."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fse_patch.fusion_core.decision.layout import ExpertLayout

sizes = st.integers(1, 1024)


@given(sizes, st.integers(1, 16), sizes, sizes, sizes)
def test_slots_follow_the_routed_experts(
    routed: int, slots: int, top_k: int, hidden: int, width: int
) -> None:
    top_k = min(top_k, routed)
    layout = ExpertLayout(routed, slots, top_k, hidden, width)
    assert [*range(routed), *layout.shared_slots] == list(range(layout.num_experts))
    assert len(layout.shared_slots) == slots == layout.fused_top_k - top_k
    assert layout.shared_intermediate_size == slots * width
    assert ExpertLayout(**layout.to_dict()) == layout


@pytest.mark.parametrize("field", list(ExpertLayout(4, 1, 2, 64, 32).to_dict()))
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1"):
        replace(ExpertLayout(4, 1, 2, 64, 32), **{field: value})


def test_more_chosen_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k 5 exceeds the 4"):
        ExpertLayout(4, 1, 5, 64, 32)


def test_it_is_frozen() -> None:
    layout = ExpertLayout(4, 1, 2, 64, 32)
    with pytest.raises(FrozenInstanceError):
        layout.top_k = 3  # type: ignore[misc]
