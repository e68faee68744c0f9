"""A short run of the fuzzer, and faults that it must find; `make fuzz` runs a million cases."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from fse_patch.fusion_core.checkpoint import weight_files
from fse_patch.fusion_core.checkpoint.naming import TensorNaming
from fse_patch.fusion_core.checkpoint.weight_files import WeightFiles
from fse_patch.fusion_core.decision import storage
from fse_patch.fusion_core.decision.policy import Policy
from fse_patch.fusion_core.decision.policy_file import load_policy
from fse_patch.fusion_core.evidence import gather

from . import fuzz as fuzzing
from .fuzz import fuzz, fuzz_one


def test_a_short_run_finds_nothing() -> None:
    result = fuzz(100_000, 15, "ci")
    print(f"fuzz: {result.cases} cases, {dict(result.outcomes)}")
    assert result.failures == []
    # Far fewer than an idle machine does: others may hold the processors.
    assert result.cases >= 200
    assert result.outcomes["ok"] >= 10
    assert len(result.outcomes) >= 6


def found(words: str, cases: int = 3000) -> bool:
    """Whether the fuzzer fails with ``words``, and again when that one case is run by its name."""
    result = fuzz(cases, 60, "control", stop=True)
    if not result.failures or words not in result.failures[0]:
        return False
    again = fuzz_one(result.failures[0].partition(":")[0])
    return bool(again.failures) and words in again.failures[0]


def test_it_finds_a_policy_that_is_believed_against_the_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "never_fuses", lambda facts: None)
    assert found("main fuses: ")


def test_it_finds_a_config_that_is_not_compared_with_the_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = gather.agreement

    def credulous(*args: Any) -> Any:
        return dataclasses.replace(honest(*args), state="agrees")

    monkeypatch.setattr(gather, "agreement", credulous)
    assert found("main fuses: ")


def test_it_finds_experts_that_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "size_conflict", lambda *_: None)
    assert found("fuses: ")


def test_it_finds_files_that_an_engine_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def every(source: Any, *_: Any) -> Any:
        names = sorted(name for name in source.names() if name.endswith(".safetensors"))
        return WeightFiles(tuple(names[:1]))

    monkeypatch.setattr(gather, "weight_files", every)
    assert found("fuses")


def test_it_finds_an_index_that_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden and stale files beside an index: read, though no engine does."""
    monkeypatch.setattr(weight_files, "_narrowed", lambda _, names, *__: set(names[:1]))
    assert found("fuses")


def test_it_finds_names_that_nobody_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorNaming, "role_of_unplaced", lambda *_: None)
    assert found("is under no prefix that is known")


def test_it_finds_4_bits_that_are_not_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: Any) -> Policy:
        rules = tuple(
            rule.model_copy(update={"pair": False}) if rule.id == "mixed" else rule
            for rule in load_policy().rules
        )
        return Policy(rules)

    monkeypatch.setattr(fuzzing, "load_policy", without)
    assert found("main does not pair")


def test_it_finds_a_method_that_must_not_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    def every(*_: Any) -> Policy:
        rules = tuple(rule.model_copy(update={"pair": True}) for rule in load_policy().rules)
        return Policy(rules)

    monkeypatch.setattr(fuzzing, "load_policy", every)
    assert found("main pairs")


def test_it_finds_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise KeyError("planted")

    monkeypatch.setattr(gather, "size_conflict", broken)
    assert found("KeyError: 'planted'")


def test_it_finds_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "LIMIT", 0.3)
    monkeypatch.setattr(fuzzing, "read_evidence", lambda *_: time.sleep(60))
    assert found("took longer than 0.3 s", cases=3)
