"""ci/releases.py: listed releases that do not resolve, and a newest one that nobody has read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import releases
import wheels

from fse_patch.adapters.patching import ledger

from .conftest import Toy

WHEEL = {
    "toy/__init__.py": b"",
    "toy/moe/E=8,N=16,device_name=A.json": b"{}",
    "toy/other.json": b"{}",
    "toy/_C.so": b"compiled",
    "toy-1.0.dist-info/METADATA": b"Name: toy",
    "toy-1.0.dist-info/RECORD": b"",
}


@pytest.fixture
def index(engine: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Releases by number, as an index would give them; the toy is 1.0, and the newest."""
    held = {"1.0": engine.root}
    monkeypatch.setattr(releases, "fetch", lambda distribution, release: held[release])
    monkeypatch.setattr(releases, "newest", lambda distribution: max(held))
    return held


def add(index: dict[str, Path], engine: Toy, folder: Path, release: str, text: str) -> None:
    site = Path(
        shutil.copytree(engine.root, folder, ignore=shutil.ignore_patterns("*.dist-info", folder.name))
    )
    (site / engine.name / "core.py").write_text(text)
    info = site / f"{engine.name}-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {engine.name}\nVersion: {release}\n")
    index[release] = site


def test_what_resolves(index: dict[str, Path], engine: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    assert releases.examine("vllm") == ({"newest": "1.0", "tables": {"1.0": [0, 0]}}, 0)
    assert "vllm 1.0: 1 seams, 0 patches do not apply" in capsys.readouterr().out


def test_a_listed_release_that_does_not_resolve(
    index: dict[str, Path], engine: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.write("core.py", "")
    assert releases.examine("vllm")[1] == 1
    assert f"{engine.name}.core:greet is not defined" in capsys.readouterr().out


def test_a_new_release_is_shown_against_the_one_that_it_is_like(
    index: dict[str, Path], engine: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(
        index,
        engine,
        tmp_path / "new",
        "1.1",
        "def greet():\n    '''Greet.'''\n    return 'hallo'  # rudely\n",
    )
    found, status = releases.examine("vllm")
    said = capsys.readouterr().out
    assert (found, status) == ({"newest": "1.1", "tables": {"1.0": [0, 0]}}, 0)
    assert "vllm 1.1: 1 seams, 1 patches do not apply; release 1.1 is new, its seams are those of 1.0" in said
    assert f"{engine.name}.core:greet\n--- 1.0\n+++ 1.1\n" in said
    assert "-    return 'hello'\n+    return 'hallo'\n" in said
    assert "rudely" not in said
    assert "Greet" not in said


def test_one_that_reads_the_same_has_nothing_to_show(
    index: dict[str, Path], engine: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(index, engine, tmp_path / "new", "1.1", "def greet():\n    return 'hello'  # rudely\n")
    assert releases.examine("vllm")[1] == 0
    assert "---" not in capsys.readouterr().out


def test_the_page_is_checked_too(
    index: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["releases.py", "--engine", "vllm"])
    assert ledger.load("vllm").listed == ("1.0",)
    monkeypatch.setattr(releases.releases_docs, "page", lambda found: "another page")
    assert releases.main() == 1
    assert "out of date" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kept"), list(zip(WHEEL, (True, True, False, False, True, False), strict=True))
)
def test_what_is_kept_of_a_wheel(name: str, kept: bool) -> None:
    assert wheels.is_read(name) == kept
