"""Blocks that SGLang has fused by itself: each gets its modes once, or stays SGLang's own."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fse_patch.adapters.role import FusedRole
from fse_patch.adapters.sglang import build, run
from fse_patch.adapters.vllm.fp8 import warm_up
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
