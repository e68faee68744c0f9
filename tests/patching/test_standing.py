"""A release that is not listed, and seams of some model families alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

import fse_patch
from fse_patch import session
from fse_patch.adapters.patching import ledger, standing
from fse_patch.errors import RefusedError
from fse_patch.patches import FOLDER

from .conftest import Toy


class TestNewRelease:
    """An installation that no row of the ledger lists."""

    REMARK = "release 1.0 is new, its seams are those of 0.9"

    @pytest.fixture
    def new(self, engine: Toy) -> Toy:
        """Release 1.0, where 0.9 is listed and reads the same."""
        self.listed(engine, "core:greet")
        return engine

    @staticmethod
    def listed(engine: Toy, *targets: str, releases: tuple[str, ...] = ("0.9",), **changes: Any) -> None:
        folder = engine.ledger(*targets, releases=[{"release": r, "cpu": True} for r in releases], **changes)
        file = folder / "vllm.fingerprints.json"
        held = json.loads(file.read_text())
        file.write_text(json.dumps({name: {releases[-1]: h["1.0"]} for name, h in held.items()}))

    def test_is_patched_and_says_whose_seams_it_has(self, new: Toy) -> None:
        report = fse_patch.apply("vllm")
        assert (report.on, report.remark) == (True, self.REMARK)
        assert report.summary().endswith(f"; {self.REMARK}")
        assert new.load("core").greet() == "hello!"
        assert standing.release_here(ledger.load("vllm")) == "0.9"
        fse_patch.remove("vllm")
        assert standing.remark_here("vllm") == ""

    def test_a_listed_one_says_nothing(self, engine: Toy) -> None:
        assert fse_patch.apply("vllm").remark == ""

    def test_a_seam_that_differs_is_named(self, new: Toy) -> None:
        new.write("core.py", "def greet():\n    return 'hallo'\n")
        with pytest.raises(RefusedError) as caught:
            fse_patch.apply("vllm")
        assert caught.value.reason == "release.seam"
        assert f"vllm 1.0: patch core:greet of {new.name}.core:greet: {new.name}.core:greet reads" in str(
            caught.value
        )
        report = fse_patch.apply("vllm", strict=False)
        assert not report.on
        assert new.load("core").greet() == "hallo"

    def test_the_patches_are_those_of_the_release_that_it_is_like(self, engine: Toy) -> None:
        engine.write("more.py", "def more():\n    return 1\n")
        self.listed(engine, "core:greet", "more:more", releases=("0.8", "0.9"))
        book = yaml.safe_load((ledger.FOLDER / "vllm.yaml").read_text())
        greet, more = book["patches"]
        # In 0.9 alone there is `more`, and here it reads otherwise.
        book["patches"] = [{**greet, "versions": ["<0.9", ">=0.9"]}, {**more, "versions": [">=0.9"]}]
        (ledger.FOLDER / "vllm.yaml").write_text(yaml.safe_dump(book))
        engine.write("more.py", "def more():\n    return 2\n")
        report = fse_patch.apply("vllm")
        assert [p.id for p in report.patches] == ["core:greet"]
        # The text is on file for 0.9 alone.
        assert report.remark == "release 1.0 is new, its seams are those of 0.8 and 0.9"


class TestFamilies:
    """A patch of some families alone leaves the others."""

    @pytest.fixture
    def two(self, engine: Toy) -> Toy:
        """Two families, each with an entry class; the definition that one patch needs has changed."""
        engine.write(
            "models.py",
            "class A:\n    def load(self): return 1\n\n\nclass B:\n    def load(self): return 1\n",
        )
        engine.ledger("core:greet", "models:A.load", "models:B.load")
        folder = ledger.FOLDER / "families"
        folder.mkdir()
        for name, cls in (("glm4_moe", "A"), ("qwen2_moe", "B")):
            text = (FOLDER / "families" / f"{name}.yaml").read_text()
            data = yaml.safe_load(text)
            model = f"{engine.name}.models:{cls}"
            block = {"class": f"{model}Block", "upstream": "none: a test"}
            data["engines"] = {"vllm": {"entry_classes": [{"model": model, "role": "main"}], "block": block}}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
        engine.write(
            "models.py",
            "class A:\n    def load(self): return 1\n\n\nclass B:\n    def load(self): return 2\n",
        )
        return engine

    def test_python_raises(self, two: Toy) -> None:
        with pytest.raises(RefusedError, match=r"fingerprint: vllm 1\.0: patch models:B\.load"):
            fse_patch.apply("vllm")

    @pytest.mark.parametrize("strict", ["", "1"])
    def test_a_server_patches_the_others(
        self, two: Toy, monkeypatch: pytest.MonkeyPatch, strict: str
    ) -> None:
        monkeypatch.setenv("FSE_PATCH_STRICT", strict)
        report = session.apply("vllm", serving=True)
        assert report.on
        assert [p.state for p in report.patches] == ["waiting for import"] * 2 + ["refused"]
        assert list(standing.refused_here("vllm")) == ["qwen2_moe"]

    def test_what_all_need_stops_all(self, two: Toy) -> None:
        two.write("core.py", "def greet():\n    return 'hallo'\n")
        report = session.apply("vllm", serving=True)
        assert not report.on
        assert "patch core:greet" in report.reason
