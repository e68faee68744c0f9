"""What public reports tell of, on the real engines: reports.yaml explains its rows."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints.variants import VARIANTS

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision.decide import decide
from fse_patch.fusion_core.decision.outcome import Stock

from .laid_out import LAID_OUT
from .running import Case, Pair, Runs

FUSES = "ok"


@dataclass(frozen=True)
class Report:
    """One row."""

    recipe: str
    source: str
    vllm: str
    sglang: str
    arguments: dict[str, Any] = field(default_factory=dict)
    values: str = ""
    not_run: tuple[str, ...] = ()
    each: bool = False

    def code(self, engine: str) -> str:
        """The reason code in an engine."""
        return self.vllm if engine == "vllm" else self.sglang

    def fused(self, engine: str, common: dict[str, Any]) -> Case:
        """The checkpoint as the row runs it, with arguments that its recipe always needs."""
        return Case(self.recipe, engine_args={**common, **self.arguments})

    def compared_with(self, engine: str, common: dict[str, Any]) -> Case:
        """What has the values that it must have, unpatched."""
        if self.code(engine) != FUSES or self.values == "own":
            return self.fused(engine, common)
        variant = VARIANTS.get(self.recipe)
        return Case(variant.recipe if variant else self.recipe, engine_args=common)


REPORTS = [Report(**row) for row in yaml.safe_load(Path(__file__).with_name("reports.yaml").read_text())]


class Suite:
    """The rows in one engine.

    Args:
        needs: engine arguments that recipes always need, by the beginning of their names.
    """

    def __init__(self, engine: str, needs: dict[str, dict[str, Any]]) -> None:
        self.engine, self.needs = engine, needs
        self.reports = [report for report in REPORTS if engine not in report.not_run]

    def _common(self, report: Report) -> dict[str, Any]:
        variant = VARIANTS.get(report.recipe)
        recipe = variant.recipe if variant else report.recipe
        return next((args for start, args in self.needs.items() if recipe.startswith(start)), {})

    def fused(self, report: Report) -> Case:
        return report.fused(self.engine, self._common(report))

    def stock(self, report: Report) -> Case:
        return report.compared_with(self.engine, self._common(report))

    def stock_cases(self) -> list[Case]:
        """What runs unpatched."""
        return list({case.name: case for case in map(self.stock, self.reports)}.values())

    def fused_cases(self) -> list[Case]:
        """What runs with the patches on."""
        return [self.fused(report) for report in self.reports]

    def parameters(self) -> list[Any]:
        """The rows as parameters of `check`: the case and what it is compared with, that both are run."""
        return [
            pytest.param(
                report,
                self.fused(report),
                self.stock(report),
                id=report.recipe,
                marks=[] if report.each else [pytest.mark.long],
            )
            for report in self.reports
        ]

    def check(self, runs: Runs, pair: Pair, report: Report, case: Case, stock: Case) -> None:
        """Fused with the values of its stock and proved, or as the unpatched engine, bit by bit."""
        fused, unpatched = pair.fused[case.name], pair.stock[stock.name]
        assert "logprobs" in fused, f"{fused.get('error')}\n{fused.get('log', '')}"
        roles = fused["workers"][0]["roles"]
        if report.code(self.engine) != FUSES:
            assert roles == []
            assert fused["logprobs"] == unpatched["logprobs"]
            return
        assert [role["canary"]["state"] for role in roles] == ["passed"], str(roles)
        judged = runs.report(case, unpatched, fused)
        assert judged["failures"] == [], judged["failures"]
        assert judged["mean_abs_logprob_diff"] <= 5e-6


def laid_out(engine: str, count: int) -> list[Case]:
    """Checkpoints as the fuzzer lays them out, with the load format that each is started with."""
    formats = ("auto", "auto", "auto", "safetensors", "dummy")
    chosen = [random.Random(f"format {seed}").choice(formats) for seed in range(count)]
    return [Case(f"{LAID_OUT}{seed}", engine_args={"load_format": f}) for seed, f in enumerate(chosen)]


def check_laid_out(engine: str, stock: dict[str, Any], fused: dict[str, Any]) -> str:
    """What the unpatched engine answers, the fused one answers: proved, or as it is. Returns which."""
    if "logprobs" not in stock:
        # Nothing is asked but that nothing wrong is served.
        states = (
            [role["canary"]["state"] for role in fused["workers"][0]["roles"]] if "workers" in fused else []
        )
        assert set(states) <= {"passed"}
        return "stops"
    assert "logprobs" in fused, f"{fused.get('error')}\n{fused.get('log', '')}"
    roles = fused["workers"][0]["roles"]
    if not roles:
        assert fused["logprobs"] == stock["logprobs"]
        return "refused"
    assert {role["canary"]["state"] for role in roles} <= {"passed", "not_loaded"}
    off = np.abs(np.concatenate(fused["logprobs"]) - np.concatenate(stock["logprobs"])).mean()
    # SGLang drops what it does not know, and answers from memory that nobody filled.
    if engine == "vllm" and all(role["canary"]["state"] == "passed" for role in roles):
        assert off <= 5e-6
    return "fused"


def decided(folder: Path, engine: str, load_format: str) -> str:
    """The reason code of the main model."""
    try:
        decision = decide(folder, engine, load_format=load_format)
    except FsePatchError:
        return "evidence.unreadable"
    return decision.reason.code if isinstance(decision, Stock) else FUSES
