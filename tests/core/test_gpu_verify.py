"""What ci/gpu_verify.py runs: its tables lead to the modes that they are for, and its recipes are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gpu_groups
import gpu_verify
import pytest
import yaml
from checkpoints.recipes import RECIPES

from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.forward.mode_registry import MODES
from fse_patch.fusion_core.forward.plan import ModePlan
from fse_patch.fusion_core.forward.tuned import Situation, plan_for

from .moe import decision

LAYOUT = ExpertLayout(num_routed=32, num_shared_slots=1, top_k=4, hidden_size=256, moe_intermediate_size=128)
DECISION = decision(LAYOUT)
ALL = [(engine, name) for engine, groups in gpu_groups.GROUPS.items() for name in groups]
MERGED = [(engine, name) for engine, name in ALL if not gpu_groups.GROUPS[engine][name].paired]


@pytest.mark.parametrize(("engine", "name"), ALL, ids="-".join)
def test_recipes_are_there(engine: str, name: str) -> None:
    recipes = gpu_groups.GROUPS[engine][name].recipes
    assert recipes
    assert recipes <= {*RECIPES, gpu_groups.FP8, gpu_groups.MIXED}


@pytest.mark.parametrize(("engine", "name"), MERGED, ids="-".join)
def test_a_table_leads_to_the_modes_of_its_group(tmp_path: Path, engine: str, name: str) -> None:
    group = gpu_groups.GROUPS[engine][name]
    file = tmp_path / "table.yaml"
    # Two models of one shape are one row.
    file.write_text(yaml.safe_dump(gpu_verify.table(engine, "1.0", "A GPU", group, [DECISION, DECISION])))
    here = Situation.of(
        LAYOUT, group.gpus, engine=engine, release="1.0", backend=group.backend, device="A GPU",
        dtype=group.dtype, scoring="softmax", gated=True, quant=group.quant,
    )  # fmt: skip
    plan = plan_for(here, "cuda", file, places=())
    assert isinstance(plan, ModePlan)
    wanted = set(MODES) if group.choice is gpu_groups.ALL_MODES else plan.modes
    assert plan.modes == wanted
    if wanted == set(MODES):
        prompts = sum(gpu_verify.verify.PROMPT_LENGTHS)
        assert [plan.mode_of(n) for n in (gpu_groups.CHUNK, prompts - gpu_groups.CHUNK, 4)] == [
            "split", "fused", "small",
        ]  # fmt: skip
        assert [plan.mode_of(n) for n in gpu_groups.PROMPT_GRAPHS] == ["once", "fused", "split"]
    # The control: another device has no plan.
    assert plan_for(replace(here, device="Another"), "cuda", file, places=()) is None


def test_fp8_runs_in_every_mode() -> None:
    groups = [g for name, g in gpu_groups.GROUPS["vllm"].items() if name.startswith(gpu_groups.FP8)]
    steps = {step["mode"] for group in groups for step in group.choice["steps"]}
    assert steps | {group.choice["otherwise"] for group in groups} == set(MODES)
