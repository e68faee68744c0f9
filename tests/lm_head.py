"""What the tests of both engines say of an LM head in 8 bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fse_patch.fusion_core.proof.compare import HEAD_DIFFERENCE
from fse_patch.fusion_core.proof.head import LEAST_AGREEMENT
from fse_patch.lab import verify

from .running import Case, Runs

HEAD = "lm_head.weight"
# One answer is decoded at a time; prompts are longer.
FEW = 4
ENVIRONMENT = {
    "FSE_PATCH_LM_HEAD": "int8:g32",
    "FSE_PATCH_CPU_THRESHOLD": str(FEW),
    "FSE_PATCH_LAYOUT": "merged",
}
FAULTS = ("head_scale_doubled", "head_rows_swapped")


def tied(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """The embedding is the head."""
    config["tie_word_embeddings"] = True
    del tensors[HEAD]


def changed(
    source: Path, out: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]
) -> Path:
    """A copy of a checkpoint with another head."""
    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


class HeadRuns:
    """Both arms over checkpoints by name; each runs once.

    Args:
        ties: the engine's models take the embedding for the head where config.json says so.
    """

    def __init__(self, runs: Runs, folder: Path, cases: list[Case], env: dict[str, str], ties: bool) -> None:
        self.runs, self.env = runs, env
        self.jobs = {case.name: replace(runs.checkpoints.job(case), lm_head=True) for case in cases}
        plain = runs.checkpoints.job(Case("qwen2_moe"))
        if ties:
            other = changed(plain.checkpoint, folder / "tied", tied)
            self.jobs["tied"] = replace(plain, checkpoint=other, lm_head=True)
        self.faulty = {
            name: replace(plain, engine_args={"fault": name}, lm_head=True)
            for name in (*FAULTS, "head_rows_rolled", "head_limit_lower")
        }
        self.done: dict[bool, dict[str, Any]] = {}

    def arm(self, ours: bool) -> dict[str, Any]:
        if ours not in self.done:
            jobs = {**self.jobs, **(self.faulty if ours else {})}
            env = self.env | (ENVIRONMENT if ours else {})
            found = self.runs.run([*jobs.values()], ours, env)
            self.done[ours] = dict(zip(jobs, found, strict=True))
        return self.done[ours]

    def sharded(self, case: Case, env: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The report of `verify` on a case in several processes, against stock in one; and our arm."""
        job = replace(self.runs.checkpoints.job(case), lm_head=True)
        (ours,) = self.runs.run([job], True, self.env | ENVIRONMENT | env)
        assert "error" not in ours, f"{ours['error']}\n{ours['log']}"
        return verify.judge(job, self.arm(False)[case.plain.name], ours), ours

    def results(self, name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The report of `verify`, and both arms; a fault is compared with the plain checkpoint."""
        plain = Case("qwen2_moe").name if name in self.faulty else name
        stock, ours = self.arm(False)[plain], self.arm(True)[name]
        for arm in (stock, ours):
            assert "error" not in arm, f"{arm['error']}\n{arm['log']}"
        job = {**self.jobs, **self.faulty}[name]
        return verify.judge(job, stock, ours), stock, ours


def check_right(report: dict[str, Any], stock: dict[str, Any], ours: dict[str, Any]) -> None:
    """Few tokens ran from the copy, and answers are within its cost; without it all is as ever."""
    assert report["failures"] == []
    head = report["lm_head"]
    assert (head["format"], head["threshold"], head["reason"]) == ("int8:g32", FEW, "")
    assert all(calls > 0 for calls in head["calls"])
    for name in ("random", "text"):
        cost = head["cost"][name]
        assert cost["agreement"] >= LEAST_AGREEMENT
        assert 0 < cost["difference"] <= HEAD_DIFFERENCE
    assert 0 < head["mean_abs_answer_diff"] <= head["limit"]
    # The control, all scales doubled, is far outside.
    assert head["control_diff"] > 5 * HEAD_DIFFERENCE
    # All prompts but the first have more tokens than that: their logits are the engine's own.
    assert ours["head_answers"]["logprobs"][1:] == ours["rebatched"][1:]
    (held,) = ours["head_workers"][0]["lm_heads"]
    assert held["calls"]["stock"] > 0


def check_each_has_its_rows(one: dict[str, Any], ours: dict[str, Any]) -> None:
    """Two processes have half of the rows each, and tell the cost of the whole head: ``one``'s."""
    assert len(ours["head_workers"]) == 2
    for worker in ours["head_workers"]:
        (held,) = worker["lm_heads"]
        assert (held["rows"], held["threshold"]) == (128, FEW)
        for kind, cost in one["cost"].items():
            assert held["cost"][kind]["agreement"] == cost["agreement"]
            assert held["cost"][kind]["difference"] == pytest.approx(cost["difference"], rel=1e-3)


def check_refused(report: dict[str, Any], ours: dict[str, Any], code: str) -> None:
    """The start has seen it, the engine's own head serves, and `verify` says so."""
    assert (report["lm_head"]["threshold"], report["lm_head"]["reason"]) == (0, code)
    assert report["failures"] == [f"LM head: refused: {code}: {report['lm_head']['detail']}"]
    assert "head_answers" not in ours
    for heads in ours["lm_heads"]:
        assert [head["megabytes"] for head in heads] == [0]


def check_seen_by_verify(report: dict[str, Any]) -> None:
    """Without proof and limit the fault would be served: it shows in answers."""
    assert report["lm_head"]["threshold"] == FEW
    # Where prompts have logits of all their tokens, the first token of an answer is the engine's own.
    assert any("LM head" in failure and "answers differ" in failure for failure in report["failures"])
