"""fse_patch.apply, remove and status on an installed toy that stands for an engine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import yaml

import fse_patch
from fse_patch import metrics, runtime, settings
from fse_patch.adapters.patching import ledger
from fse_patch.errors import FsePatchError, RefusedError

from .conftest import Toy

VARIABLES = ("FSE_PATCH", "FSE_PATCH_STRICT")


def environment() -> Mapping[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


class TestApply:
    def test_report(self, engine: Toy) -> None:
        report = fse_patch.apply("vllm")
        assert (report.engine, report.engine_version, report.on) == ("vllm", "1.0", True)
        assert [(p.id, p.target, p.state) for p in report.patches] == [
            ("core:greet", f"{engine.name}.core:greet", "waiting for import")
        ]
        assert "vllm 1.0: on: 1 waiting for import" in str(report)
        assert json.loads(json.dumps(report.to_dict()))["patches"][0]["id"] == "core:greet"
        assert not engine.loaded("core")

    def test_twice_is_once(self, engine: Toy) -> None:
        core = engine.load("core")
        assert fse_patch.apply("vllm") == fse_patch.apply("vllm")
        assert core.greet() == "hello!"

    def test_a_patch_of_a_setting_is_put_in_on_request(
        self, engine: Toy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine.write("core.py", "def greet():\n    return 'hello'\n\n\ndef wide():\n    return 1\n")
        book = yaml.safe_load((ledger.FOLDER / "vllm.yaml").read_text())
        (entry,) = book["patches"]
        wide = {**entry, "id": "asked", "target": f"{engine.name}.core:wide", "setting": settings.GATE_KERNEL}
        path = engine.ledger("core:greet", "core:wide", patches=[entry, wide])
        assert path == ledger.FOLDER
        assert [p.id for p in fse_patch.apply("vllm").patches] == ["core:greet"]
        fse_patch.remove("vllm")
        monkeypatch.setenv(settings.GATE_KERNEL, "1")
        assert [p.id for p in fse_patch.apply("vllm").patches] == ["core:greet", "asked"]

    def test_remove_puts_the_original_back(self, engine: Toy) -> None:
        core = engine.load("core")
        original = core.greet
        fse_patch.apply("vllm")
        fse_patch.remove("vllm")
        assert core.greet is original
        assert fse_patch.status() == {}
        fse_patch.remove("vllm")


class TestEnvironment:
    def test_children_are_told_until_removed(self, engine: Toy) -> None:
        fse_patch.apply("vllm")
        assert environment() == {"FSE_PATCH": "vllm"}
        fse_patch.remove("vllm")
        assert environment() == {}

    @pytest.mark.parametrize(
        ("before", "during"), [("1", "1"), ("0", "vllm"), ("sglang", "sglang,vllm"), ("", "vllm")]
    )
    def test_previous_value_comes_back(
        self, engine: Toy, monkeypatch: pytest.MonkeyPatch, before: str, during: str
    ) -> None:
        monkeypatch.setenv("FSE_PATCH", before)
        fse_patch.apply("vllm")
        assert os.environ["FSE_PATCH"] == during
        fse_patch.remove("vllm")
        assert os.environ["FSE_PATCH"] == before

    def test_options_given_reach_children(self, engine: Toy) -> None:
        fse_patch.apply("vllm", strict=False)
        assert environment() == {"FSE_PATCH": "vllm", "FSE_PATCH_STRICT": "0"}
        fse_patch.remove("vllm")
        assert environment() == {}


class TestRefused:
    @pytest.fixture
    def changed(self, engine: Toy) -> Toy:
        engine.write("core.py", "def greet():\n    return 'hallo'\n")
        return engine

    def test_strict_raises_and_changes_nothing(self, changed: Toy) -> None:
        core = changed.load("core")
        original = core.greet
        with pytest.raises(RefusedError, match="fingerprint"):
            fse_patch.apply("vllm")
        assert core.greet is original
        assert environment() == {}
        assert fse_patch.status()["vllm"]["on"] is False

    def test_not_strict_reports(self, changed: Toy) -> None:
        report = fse_patch.apply("vllm", strict=False)
        assert not report.on
        assert report.patches[0].state == "refused"
        assert report.patches[0].reason.startswith("fingerprint: ")
        assert changed.load("core").greet() == "hallo"
        assert environment() == {}

    def test_a_release_older_than_the_listed_ones(self, engine: Toy) -> None:
        engine.ledger("core:greet", releases=[{"release": "2.0", "cpu": True}])
        with pytest.raises(RefusedError, match=r"version\.untested: vllm 1\.0 is older .* \(2\.0\)"):
            fse_patch.apply("vllm")

    @pytest.mark.parametrize(("given", "raises"), [("", True), ("1", True), ("0", False)])
    def test_strictness_by_the_environment(
        self, changed: Toy, monkeypatch: pytest.MonkeyPatch, given: str, raises: bool
    ) -> None:
        monkeypatch.setenv("FSE_PATCH_STRICT", given)
        with pytest.raises(RefusedError) if raises else nullcontext():
            assert not fse_patch.apply("vllm").on

    def test_all_or_nothing(self, engine: Toy) -> None:
        engine.write("more.py", "def more():\n    return 1\n")
        engine.ledger("core:greet", "more:more")
        engine.write("more.py", "def more():\n    return 2\n")
        core = engine.load("core")
        report = fse_patch.apply("vllm", strict=False)
        assert [p.state for p in report.patches] == ["not applied", "refused"]
        assert core.greet() == "hello"

    def test_works_once_the_cause_is_gone(self, changed: Toy) -> None:
        with pytest.raises(RefusedError):
            fse_patch.apply("vllm")
        changed.ledger("core:greet")
        assert fse_patch.apply("vllm").on
        assert fse_patch.status()["vllm"]["on"] is True

    def test_while_a_module_is_imported(self, engine: Toy, caplog: pytest.LogCaptureFixture) -> None:
        factories = engine.root / f"{engine.factories}.py"
        factories.write_text("def louder(original):\n    raise ValueError('boom')\n")
        fse_patch.apply("vllm", strict=False)
        assert engine.load("core").greet() == "hello"
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "boom" in fse_patch.status()["vllm"]["reason"]
        assert environment() == {}


class TestBadInput:
    @pytest.mark.parametrize("name", ["vlm", "", "VLLM"])
    def test_unknown_engine(self, name: str) -> None:
        for function in (fse_patch.apply, fse_patch.remove):
            with pytest.raises(FsePatchError, match="use vllm or sglang") as caught:
                function(name)
            assert "\n" not in str(caught.value)

    def test_engine_that_is_not_installed(self, engine: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            ledger, "FOLDER", engine.ledger("core:greet", distributions=["absent-one", "absent-two"])
        )
        with pytest.raises(FsePatchError, match="not installed here") as caught:
            fse_patch.apply("vllm", strict=False)
        assert caught.value.exit_status == 2
        assert "\n" not in str(caught.value)

    def test_malformed_setting(self, engine: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FSE_PATCH", "maybe")
        with pytest.raises(FsePatchError, match="FSE_PATCH='maybe'"):
            fse_patch.apply("vllm")


def test_metrics_are_published_at_each_change_once_patches_are_in(
    engine: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[Mapping[str, Any]] = []
    monkeypatch.setattr(metrics, "publish", lambda status: published.append(status()))
    monkeypatch.setattr(runtime, "_listeners", [])
    runtime.changed()
    assert published == []
    for _ in range(2):
        fse_patch.apply("vllm")
    runtime.changed()
    assert [list(status) for status in published] == [["vllm"]]
    assert published[0]["vllm"]["engine_version"] == "1.0"


def test_status_carries_decisions_and_counters(engine: Toy) -> None:
    runtime.clear()
    fse_patch.apply("vllm")
    for _ in range(2):
        runtime.record_decision({"engine": "vllm", "role": "main", "fuse": True})
    runtime.record_decision({"engine": "sglang", "role": "main", "fuse": False})
    runtime.count("calls.fused")
    runtime.count("calls.fused", 2)
    status = json.loads(json.dumps(fse_patch.status()))
    assert status["vllm"]["decisions"] == [{"engine": "vllm", "role": "main", "fuse": True}]
    assert status["vllm"]["counters"] == {"calls.fused": 3}
    assert status["vllm"]["pid"] == os.getpid()
    runtime.clear()
