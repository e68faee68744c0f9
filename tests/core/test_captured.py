"""What CUDA graphs captured is remembered; a capture is not asked about where none can be."""

from __future__ import annotations

import pytest
import torch

from fse_patch.fusion_core.forward import router as routing

from .test_routing import example, router_of


def test_what_a_graph_captured_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    case, in_use, captured = example(), [True], [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured[0])
    router, hidden = router_of(case), torch.zeros(5, 8, dtype=torch.float64)

    def after_start_up() -> tuple[list[int], dict[str, int], dict[str, int]]:
        router(hidden, case.logits)
        router.counter.reset()
        counter = router.counter
        return counter.layers(), counter.by_mode(), counter.captured_by_mode()

    # The controls: calls of a warm-up, and of a process without a GPU in use, are forgotten.
    captured[0] = False
    assert after_start_up() == ([], {}, {})
    in_use[0], captured[0] = False, True
    assert after_start_up() == ([], {}, {})
    in_use[0] = True
    assert after_start_up() == ([3], {}, {"fused": 1})
    # A call that is captured is a call, too.
    router(hidden, case.logits)
    assert (router.counter.by_mode(), router.counter.captured_by_mode()) == ({"fused": 1}, {"fused": 2})


def test_dynamo_asks_for_no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(routing, "capturing", lambda: bool(asked.append(True)))
    case = example()
    router, hidden = router_of(case), torch.zeros(5, 8, dtype=torch.float64)
    torch.compile(router, backend="eager", fullgraph=True)(hidden, case.logits)
    assert not asked
    router(hidden, case.logits)
    assert asked
