"""Rows that pad a batch, between SGLang's top-k and its experts. The hook itself needs no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from fse_patch.adapters.sglang import native
from fse_patch.adapters.sglang.build import AppendHook
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import RoutingSpec
from fse_patch.fusion_core.forward.plan import ModeCounter
from fse_patch.fusion_core.forward.router import SlotAppender

from ..core.moe import moe_spec

LAYOUT = ExpertLayout(num_routed=4, num_shared_slots=2, top_k=2, hidden_size=3, moe_intermediate_size=8)
WEIGHTS = torch.tensor([[0.6, 0.4], [0.0, 0.0], [0.5, 0.5]])


class Standard(NamedTuple):
    """As SGLang's own."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor

    @property
    def format(self) -> Any:
        return SimpleNamespace(name="STANDARD")


def hooked(padding: bool, pad_id: int) -> tuple[list[list[float]], list[list[int]]]:
    made = moe_spec(LAYOUT, RoutingSpec("softmax", True))
    with patch.object(native, "platform", lambda: "rocm" if padding else "cuda"):
        hook = AppendHook(SlotAppender(0, made, ModeCounter(), lambda x: x[:, :1]))
    ids = torch.tensor([[0, 1], [pad_id, pad_id], [2, 3]], dtype=torch.int32)
    given = {
        "hidden_states": torch.zeros(3, 3),
        "topk_output": Standard(WEIGHTS.clone(), ids, torch.zeros(3, 4)),
    }
    _, kwargs = hook(torch.nn.Module(), (), given)
    out = kwargs["topk_output"]
    return out.topk_weights.tolist(), out.topk_ids.tolist()


@pytest.mark.parametrize("pad_id", [0, -1])
def test_padded_rows_leave_as_zero_on_rocm(pad_id: int) -> None:
    """sgl-project/sglang#30895: ranks that add something for padded rows wait for each other."""
    weights, ids = hooked(True, pad_id)
    assert weights[1] == [0.0] * 4
    assert ids[1] == [0] * 4
    assert [row[2:] for row in (weights[0], weights[2])] == [[0.5, 0.5]] * 2
    assert [row[2:] for row in (ids[0], ids[2])] == [[4, 5]] * 2
    # The control: elsewhere the slots are appended to every row.
    assert hooked(False, pad_id)[0][1][2:] == [0.5, 0.5]
