"""Launches overlap on a GPU: a kernel waits for the one before it, and would be wrong if it did not."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fse_patch.fusion_core.kernels import launch, route, router_logits

from .test_kernels import DEVICE, QWEN, draw, off

HIDDEN, EXPERTS, TOP_K = 8192, 512, 8


@triton.jit
def early(PDL: tl.constexpr):
    """`launch.begin` without its wait."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


def replays() -> list[float]:
    """How far each replay of logits and routing in a graph is off; every replay has states of its own."""
    gate = draw(EXPERTS, HIDDEN, seed=12, dtype=torch.bfloat16, scale=0.1)
    states = draw(4, HIDDEN, seed=15, dtype=torch.bfloat16)

    def routed() -> tuple[torch.Tensor, torch.Tensor]:
        return route.route(router_logits.router_logits(states, gate), TOP_K, range(EXPERTS, EXPERTS), QWEN)

    def of_experts(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        # What did not wait may have read anything.
        return weights.new_zeros(4, EXPERTS).scatter(1, ids.long().clamp(0, EXPERTS - 1), weights)

    routed()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = routed()
    found = []
    for seed in range(20, 40):
        states.copy_(draw(4, HIDDEN, seed=seed, dtype=torch.bfloat16))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        logits = router_logits.reference(states, gate)
        wanted = route.reference(logits, TOP_K, range(EXPERTS, EXPERTS), QWEN)
        found.append(off(of_experts(*got), of_experts(*wanted)))
    return found


@pytest.mark.skipif(
    not launch.options(torch.empty(1, device=DEVICE))["PDL"], reason="launches do not overlap here"
)
def test_a_kernel_that_does_not_wait_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(replays()) < 1e-3
    # Of all kernels routing alone: it reads numbers, where others read addresses.
    kernels = {n: k for n, k in vars(route).items() if isinstance(k, triton.JITFunction)}
    (name,) = (n for n, k in kernels.items() if "begin(PDL)" in k.src)
    monkeypatch.setattr(route, "begin", early)
    monkeypatch.setattr(route, name, triton.jit(kernels[name].fn))
    assert max(replays()) > 0.1
