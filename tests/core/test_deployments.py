"""What is said of deployments that people published."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from versions_docs import releases

from fse_patch.fusion_core.engines import facts_of
from fse_patch.launch.command import engine_of_command
from fse_patch.patches import ENGINES

from .plans import BEST, checkpoint, plan

DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("deployments.yaml").read_text())


@pytest.mark.parametrize("row", DEPLOYMENTS, ids=lambda row: f"{row['id']}-{row['release']}")
def test_real_deployments(row: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoint(row["checkpoint"], tmp_path)
    words = shlex.split(row["command"].format(m=folder))
    engine = engine_of_command(words)
    assert engine is not None
    for release, expected in ((row["release"], row["as_run"]), (BEST[engine], row["best"])):
        command = ["--engine-version", release, "--device", row["device"], "--", *words]
        status, report = plan(folder, *command)
        runtime = report["runtime"]
        served = runtime["served"]
        assert f"{served} {runtime['layout'] or runtime['reason']}" == expected, runtime["detail"]
        assert (runtime["layout"] is None) == (runtime["reason"] is not None) == (served != "fused")
        assert status == (0 if served == "fused" else 3)
        assert (runtime["modes"] is not None) >= (runtime["layout"] == "merged")
        # What a table knows is told; where nothing runs of ours, nothing is gained.
        by_table = ".yaml" in runtime["detail"] and runtime["modes"] is not None
        assert (runtime["gain"] is not None) == by_table


@pytest.mark.parametrize("engine", ENGINES)
def test_the_page_says_of_a_release_on_a_gpu_what_plan_says(engine: str, tmp_path: Path) -> None:
    folder = checkpoint("qwen3.5_35b_text", tmp_path)
    launch = {"vllm": "vllm serve {m}", "sglang": "python -m sglang.launch_server --model-path {m}"}
    words = shlex.split(launch[engine].format(m=folder))
    told = [[cell.strip() for cell in row.split("|")[2:5:2]] for row in releases(facts_of(engine))]
    assert {release for release, _ in told} == {row.release for row in facts_of(engine).releases}
    for release, said in told:
        _, report = plan(folder, "--engine-version", release, "--device", "NVIDIA H200", "--", *words)
        runtime = report["runtime"]
        # A table says whether merged gains over paired.
        layouts = ("merged", "paired") if "merged" in said else ("paired",)
        assert (runtime["served"], said.split()[0]) == ("fused", "fused")
        assert runtime["layout"] in layouts


def test_thirty_two_deployments_are_there() -> None:
    assert len({row["id"] for row in DEPLOYMENTS}) == len(DEPLOYMENTS) == 32
