"""The config is asked about every projection of every expert, by the name that it has in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fse_patch.fusion_core.checkpoint.config import ConfigFile
from fse_patch.fusion_core.checkpoint.families import family_of
from fse_patch.fusion_core.checkpoint.headers import TensorHeader
from fse_patch.fusion_core.decision.decide import decide
from fse_patch.fusion_core.evidence.agreement import Agreement, MlpClaim, agreement, cut_across
from fse_patch.fusion_core.evidence.specs import ALL_EXPERTS
from fse_patch.fusion_core.quant.claims import PLAIN, Claim, Doubt

from .checkpoints import config_of, model_tensors, write_checkpoint
from .golden import projections
from .outcomes import code

LAYER = "model.layers.0.mlp"
MODULES: Any = {"routed": f"{LAYER}.experts", "shared": f"{LAYER}.shared_expert"}
EXPERTS, HIDDEN, WIDTH, GROUP = 5, 64, 32, 16
INT4 = Claim("int4-gptq", 4, (1, GROUP), details=("symmetric",))
OTHER = replace(INT4, details=("zero points",))
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def parts(kind: str = f"int4-gptq:{GROUP}") -> Any:
    """Headers of one layer, as gather.py has them."""
    made: dict[str, dict[Any, dict[int, TensorHeader]]] = {"routed": {}, "shared": {}}
    for name, (dtype, shape) in projections("", WIDTH, HIDDEN, kind).items():
        projection, _, suffix = name.partition(".")
        header = TensorHeader(dtype, shape)
        made["routed"][projection, suffix] = dict.fromkeys(range(EXPERTS), header)
        made["shared"][projection, suffix] = {ALL_EXPERTS: header}
    return made


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = config_of("qwen3_next", num_experts=EXPERTS)
    family = family_of("qwen3_next")
    assert family is not None
    return ConfigFile(write_checkpoint(tmp_path_factory.mktemp("moe"), config, None)).moe(family)


def compared(moe: Any, resolve: Callable[[str], Claim]) -> Agreement:
    return agreement(parts(), MODULES, resolve, moe)


def but(*others: str, claim: Claim = OTHER) -> Callable[[str], Claim]:
    return lambda name: claim if name in others else INT4


def test_all_alike_agree(moe: Any) -> None:
    found = compared(moe, but())
    assert (found.state, found.detail, found.alike, found.format) == ("agrees", "", True, "int4-gptq")
    assert found.routed == found.shared == MlpClaim(INT4, INT4)


@pytest.mark.parametrize("expert", range(EXPERTS))
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_one_expert_of_another_kind_is_a_doubt(moe: Any, expert: int, projection: str) -> None:
    """Headers show no symmetry: the first and the second name tell nothing of the last."""
    name = f"{LAYER}.experts.{expert}.{projection}"
    found = compared(moe, but(name))
    assert (found.state, found.alike, found.format) == ("unknown", None, "")
    assert name in found.detail


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_one_projection_of_all_experts_of_another_kind(moe: Any, projection: str) -> None:
    found = compared(moe, but(*(f"{LAYER}.experts.{n}.{projection}" for n in range(EXPERTS))))
    # Gate and up are one tensor to kernels; down is another.
    assert (found.state, found.alike) == (
        ("differs", False) if projection == "down_proj" else ("unknown", None)
    )
    shared = compared(moe, but(f"{LAYER}.shared_expert.{projection}"))
    assert (shared.state, shared.alike) == (found.state, found.alike)


def test_every_name_is_asked_for_once(moe: Any) -> None:
    asked: list[str] = []

    def resolve(name: str) -> Claim:
        asked.append(name)
        return INT4

    compared(moe, resolve)
    routed = [f"{LAYER}.experts.{n}.{p}" for p in PROJECTIONS for n in range(EXPERTS)]
    assert sorted(asked) == sorted(routed + [f"{LAYER}.shared_expert.{p}" for p in PROJECTIONS])


def test_what_the_config_says_of_one_part_alone(moe: Any) -> None:
    shared = [f"{LAYER}.shared_expert.{p}" for p in PROJECTIONS]
    found = compared(moe, but(*shared))
    assert (found.state, found.alike) == ("differs", False)
    assert "symmetric" in found.detail
    assert "zero points" in found.detail
    # Plain, it says, and packed integers are there: nobody knows what they are.
    wrong = compared(moe, but(*shared, claim=PLAIN))
    assert (wrong.state, wrong.alike) == ("contradicts", None)
    both = compared(moe, lambda _: PLAIN)
    assert (both.state, both.alike) == ("contradicts", True)


def test_what_differs_in_size_too_says_so(moe: Any) -> None:
    wide = parts()
    wide["shared"] = parts(f"int4-gptq:{GROUP // 2}")["shared"]
    names = [f"{LAYER}.shared_expert.{p}" for p in PROJECTIONS]
    found = agreement(wide, MODULES, but(*names, claim=replace(INT4, group=(1, GROUP // 2))), moe)
    assert found.state == "differs"
    assert found.sizes != ""
    assert compared(moe, but()).sizes == ""


def test_slots_end_where_blocks_of_gate_and_up_end_by_rows_and_of_down_by_columns() -> None:
    tall, flat = Claim("fp8-block", group=(32, 64)), Claim("fp8-block", group=(64, 32))
    assert cut_across(MlpClaim(tall, flat), 96) == ""
    assert cut_across(MlpClaim(flat, flat), 96).startswith("gate_up: fp8-block, block 64x32 does not end")
    assert cut_across(MlpClaim(tall, tall), 96).startswith("down: fp8-block, block 32x64 does not end")


def test_a_doubt_has_its_words(moe: Any) -> None:
    def resolve(_: str) -> Claim:
        raise Doubt("a word of tomorrow")

    found = compared(moe, resolve)
    assert (found.state, found.detail, found.routed, found.shared) == (
        "unknown",
        "a word of tomorrow",
        None,
        None,
    )


@pytest.mark.parametrize("expert", range(4))
def test_the_decision_asks_about_every_expert(tmp_path: Path, expert: int) -> None:
    fp8 = {"quant_method": "fp8", "ignored_layers": [f"model.layers.1.mlp.experts.{expert}"]}
    folder = write_checkpoint(tmp_path, config_of("qwen3_next"), model_tensors("qwen3_next"))
    assert code(decide(folder, "vllm")) == "ok", "control"
    write_checkpoint(tmp_path, config_of("qwen3_next", quantization_config=fp8), model_tensors("qwen3_next"))
    assert code(decide(folder, "vllm")).startswith("quant.")
