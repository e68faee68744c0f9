"""Which modules adapters may change beside layers of ours, and sizes that divide over processes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fse_patch.adapters.lora import (
    check_adapter,
    folders_of,
    refused_adapters,
    refused_targets,
    touches_block,
)
from fse_patch.adapters.refusals import undivided
from fse_patch.fusion_core.decision.layout import ExpertLayout

from .safetensors import save

FLAG = "--lora-target-modules"
ATTENTION, ROUTED = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.3.up_proj"


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


def adapter(folder: Path, module: str, **config: Any) -> Path:
    """An adapter with a tensor of one module."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save(
        folder / "adapter_model.safetensors", {f"base_model.model.{module}.lora_A.weight": torch.zeros(1, 1)}
    )
    return folder


def refused(folder: Path, targets: list[str] | None = None) -> str:
    return "".join(reason.detail for reason in refused_adapters(targets, {"mine": str(folder)}, FLAG))


def test_an_adapter_of_the_attention_is_limit_enough(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", ATTENTION, target_modules=["q_proj"])
    assert refused(folder) == ""
    # The control: without an adapter nothing limits those that come later.
    assert list(refused_adapters(None, {}, FLAG)) != []


@pytest.mark.parametrize(
    ("module", "config", "named"),
    [
        (ATTENTION, {"target_modules": ["q_proj", "down_proj"]}, "down_proj"),
        (
            ATTENTION,
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.w13"]},
            "mlp.experts.w13",
        ),
        # What its config does not say, but its tensors do.
        (ROUTED, {"target_modules": ["q_proj"]}, f"base_model.model.{ROUTED}.lora_A.weight"),
    ],
)
@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_an_adapter_of_experts_is_named(
    tmp_path: Path, module: str, config: dict[str, Any], named: str, targets: list[str] | None
) -> None:
    said = refused(adapter(tmp_path / "a", module, **config), targets)
    assert said.startswith(f"LoRA adapter 'mine' changes {named}; start with adapters of the attention alone")


@pytest.mark.parametrize(
    "config",
    [{}, {"target_modules": "all-linear"}, {"target_modules": r".*\.q_proj"}, {"target_modules": None}],
)
def test_an_adapter_that_does_not_list_its_modules_needs_a_limit(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = adapter(tmp_path / "a", ATTENTION, **config)
    assert "give --lora-target-modules" in refused(folder)
    assert refused(folder, ["q_proj"]) == ""


def test_an_adapter_that_is_not_here_needs_a_limit(tmp_path: Path) -> None:
    assert "give --lora-target-modules" in refused(tmp_path / "none")
    (broken := adapter(tmp_path / "b", ATTENTION, target_modules=["q_proj"])).joinpath(
        "adapter_model.safetensors"
    ).write_bytes(b"short")
    assert "give --lora-target-modules" in refused(broken)


@pytest.mark.parametrize(
    "given",
    [
        {"a": "/x", "/y": "/y"},
        ["a=/x", "/y", ""],
        [{"lora_name": "a", "lora_path": "/x"}, SimpleNamespace(lora_name="/y", lora_path="/y")],
    ],
)
def test_adapters_in_every_form(given: Any) -> None:
    assert folders_of(given) == {"a": "/x", "/y": "/y"}


def test_no_adapters() -> None:
    assert folders_of(None) == {}


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
