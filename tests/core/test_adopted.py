"""Blocks that SGLang has fused by itself: each gets its modes once, or stays SGLang's own."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fse_patch.adapters.role import FusedRole
from fse_patch.adapters.sglang import build, run
from fse_patch.adapters.vllm.experts import Experts, check_output
from fse_patch.adapters.vllm.fp8 import warm_up
from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.reasons import Reason

from .moe import Slots, decision, start_of

MADE = decision(ExpertLayout(3, 1, 2, 8, 4), layers=(0, 1)).refused(Reason("upstream.already", "test"))


class Block(torch.nn.Module):
    """A MoE block of SGLang's, as far as it is looked at."""

    def __init__(self, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.experts, self.gate = torch.nn.Module(), torch.nn.Module()
        self.shared_expert_gate = torch.nn.Linear(8, 1, bias=False)


@pytest.fixture
def role(monkeypatch: pytest.MonkeyPatch) -> FusedRole:
    """A role of a model whose blocks are all as they should be."""
    monkeypatch.setattr(build, "check_native", lambda *_: None)
    monkeypatch.setattr(run, "runs_modes", lambda block: True)
    monkeypatch.setattr(run, "execution_of", lambda start, block, router: SimpleNamespace(router=router))
    return FusedRole(start_of(MADE), Slots())


def modes_of(block: torch.nn.Module) -> Any:
    return getattr(block, run.ATTRIBUTE, None)


def test_a_block_that_comes_twice_gets_its_modes_once(role: FusedRole) -> None:
    blocks = [Block(0), Block(1)]
    for block in (*blocks, *blocks):
        build.adopt(role, block)
    assert [layer.block for layer in role.layers.values()] == blocks
    assert modes_of(blocks[0]) is not modes_of(blocks[1])


def test_another_block_of_the_same_layer_stays_sglangs_own(
    role: FusedRole, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "fse_patch")
    first, second = Block(0), Block(0)
    build.adopt(role, first)
    assert (modes_of(first) is None, caplog.messages) == (False, [])
    build.adopt(role, second)
    assert (modes_of(second), role.layers[0].block) == (None, first)
    assert "layer 0 of the main model was built twice" in caplog.messages[0]


def test_no_kernel_is_warmed_up_where_none_is_in_8_bits() -> None:
    # Nothing is asked of vLLM, which is not here.
    warm_up(FusedRole(start_of(MADE), Slots()), None)


def sums(name: str) -> Any:
    """A forward that calls a function of this name, behind a branch that is not taken."""
    space: dict[str, Any] = {}
    exec(f"def forward(self, x):\n    if 0 > 1:\n        {name}(x)\n    if self:\n        {name}(x)\n", space)
    return space["forward"]


def test_how_a_block_sums_over_processes_is_seen_in_its_forward() -> None:
    assert run.sum_of(sums("should_skip_post_experts_all_reduce")) is run._sum_of_tensor_parallel
    assert run.sum_of(sums("reduce_moe_output")) is run._sum_by_its_function
    states = torch.ones(1, 2)
    assert run.sum_of(sums("other"))(None, states) is states
    with pytest.raises(FsePatchError, match="in a way that nobody has read"):
        run.sum_of(sums("reduce_in_another_way"))


def test_a_sum_that_is_asked_for_later_stops() -> None:
    run.check_finished({})
    run.check_finished({"defer_finalize": False})
    with pytest.raises(FsePatchError, match="leave their sum to a later layer"):
        run.check_finished({"defer_finalize": True})


class Allocated:
    """vLLM's kernel of a release, whose buffers are so many, and what its experts are called with."""

    def __init__(self, buffers: int, unfinished: Any = None) -> None:
        self.buffers, self.unfinished, self.given = buffers, unfinished, {}
        self.prepare_finalize = SimpleNamespace(prepare=lambda states, *_, **__: (states, None))
        self.fused_experts = SimpleNamespace(
            quant_config=None,
            expects_unquantized_inputs=True,
            a2_scale=None,
            moe_problem_size=lambda states, w13, w2, ids: (4, 1, 8, 2, 2),
            apply=self.apply,
        )

    def _allocate_buffers(self, *_: Any) -> tuple[Any, ...]:
        return ("workspace13", "workspace2", "output", False)[: self.buffers]

    def apply(self, **given: Any) -> Any:
        self.given = given
        return self.unfinished


@pytest.mark.parametrize("buffers", [3, 4])
def test_experts_get_their_workspaces_whatever_else_a_release_allocates(buffers: int) -> None:
    kernel = Allocated(buffers)
    gemm(kernel)
    assert (kernel.given["workspace13"], kernel.given["workspace2"]) == ("workspace13", "workspace2")
    with pytest.raises(FsePatchError, match="left the sum of their outputs"):
        gemm(Allocated(buffers, unfinished=object()))


def gemm(kernel: Allocated) -> torch.Tensor:
    method = SimpleNamespace(moe_kernel=SimpleNamespace(impl=kernel))
    experts = Experts(SimpleNamespace(quant_method=method, activation="silu"), None)
    return experts.gemm(
        torch.ones(1, 2), torch.ones(4, 4, 2), torch.ones(4, 2, 2), (torch.ones(1, 2), torch.ones(1, 2))
    )


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ({"moe_config": SimpleNamespace()}, ""),
        ({"moe_config": SimpleNamespace(_defer_moe_finalize=False), "post_gemm2_hook": None}, ""),
        ({"moe_config": SimpleNamespace(_defer_moe_finalize=True)}, "leave their sum to a later layer"),
        ({"moe_config": SimpleNamespace(), "post_gemm2_hook": print}, "have a post_gemm2_hook"),
    ],
)
def test_outputs_that_somebody_takes_before_the_sum(experts: dict[str, Any], words: str) -> None:
    with pytest.raises(FsePatchError, match=words) if words else nullcontext():
        check_output(SimpleNamespace(**experts))
