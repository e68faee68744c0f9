"""Which modules adapters may change beside layers of ours, and sizes that divide over processes."""

from __future__ import annotations

import pytest

from fse_patch.adapters.lora import check_adapter, refused_targets, touches_block
from fse_patch.adapters.refusals import undivided
from fse_patch.fusion_core.decision.layout import ExpertLayout


@pytest.mark.parametrize(
    "name",
    [
        "experts",
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
        "w13",
        "gate",
        "shared_expert_gate",
        "model.layers.0.mlp.shared_expert.up_proj",
        "model.layers.3.mlp.experts",
        "shared_experts.down_proj",
        "all",
        "all-linear",
    ],
)
def test_modules_of_a_sparse_block(name: str) -> None:
    assert touches_block(name)
    (reason,) = refused_targets(["q_proj", name], "--lora-target-modules")
    assert reason.code == "lora"
    assert name in reason.detail


@pytest.mark.parametrize(
    "name", ["q_proj", "qkv_proj", "o_proj", "out_proj", "in_proj_qkvz", "lm_head", "embed_tokens", "g_proj"]
)
def test_other_modules(name: str) -> None:
    """The control of the test above."""
    assert not touches_block(name)
    assert list(refused_targets([name], "--lora-target-modules")) == []


@pytest.mark.parametrize("targets", [None, [], set()])
def test_without_a_limit_adapters_may_change_all(targets: list[str] | None) -> None:
    (reason,) = refused_targets(targets, "--lora-target-modules")
    assert "give --lora-target-modules" in reason.detail


def test_an_adapter_where_nothing_of_ours_runs() -> None:
    check_adapter("any", ["model.layers.0.mlp.experts.0.up_proj"])


def sizes(width: int, parts: int, block: list[int] | None = None, groups: int = 1) -> str:
    layout = ExpertLayout(8, 1, 2, 64, width)
    return "".join(r.detail for r in undivided(layout, parts, block, "--tensor-parallel-size", groups))


@pytest.mark.parametrize(
    ("width", "parts", "block", "groups", "number"),
    [
        (1408, 3, None, 1, 2),
        (768, 7, None, 1, 6),
        (32, 64, None, 1, 32),
        (512, 8, [128, 128], 1, 4),
        (1408, 2, [128, 128], 1, 1),
        (96, 5, None, 2, 8),
    ],
)
def test_a_number_that_would_divide_is_named(
    width: int, parts: int, block: list[int] | None, groups: int, number: int
) -> None:
    said = sizes(width, parts, block, groups)
    assert said.endswith(f"run with --tensor-parallel-size {number}")
    assert f"{width} wide" in said
    # The control: with that number nothing is refused.
    assert sizes(width, number // groups, block) == ""


@pytest.mark.parametrize(
    ("width", "parts", "block"), [(1408, 1, [128, 128]), (1408, 8, None), (512, 4, [128, 128])]
)
def test_sizes_that_divide(width: int, parts: int, block: list[int] | None) -> None:
    assert sizes(width, parts, block) == ""
