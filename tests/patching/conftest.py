"""Small real packages to patch: written to a folder, imported, thrown away."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from fse_patch.adapters.patching import ledger
from fse_patch.adapters.patching.source import fingerprint
from fse_patch.adapters.patching.spec import PatchSpec, Source
from fse_patch.adapters.patching.transaction import PatchSet

_numbers = itertools.count()

FACTORIES = """
from functools import wraps


def louder(original):
    @wraps(original)
    def call(*args, **kwargs):
        return original(*args, **kwargs) + "!"

    return call


def subclass(original):
    return type(original.__name__, (original,), {"patched": True})


def louder_property(original):
    return property(lambda self: original.fget(self) + "!")


def failing(original):
    raise ValueError("boom")


def nothing(original):
    return original


class Proxy:
    def __init__(self, original):
        pass


def callable_object(original):
    return Proxy(original)
"""


# Of an engine, what its file has to say beside what is patched.
FACTS: dict[str, Any] = {
    "releases": [{"release": "1.0", "cpu": True}],
    "read": ">=1",
    "backends": {},
    "plugins": {"group": "toy.plugins", "variable": "TOY_PLUGINS"},
    "tuned_tables": {"folder": "tables", "variable": "TOY_TABLES"},
    "load_formats": {"auto": {"patterns": ["*.safetensors"]}},
    "lab": {"draft_argument": "draft"},
}


class Toy:
    """A package of its own name, so that tests cannot see each other's modules and hooks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = f"toy{next(_numbers)}"
        self.factories = f"{self.name}_factories"
        self.write("__init__.py", "")
        (root / f"{self.factories}.py").write_text(FACTORIES)

    def write(self, path: str, text: str) -> None:
        file = self.root / self.name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        # {me} stands for the package's name
        file.write_text(textwrap.dedent(text).replace("{me}", self.name))
        importlib.invalidate_caches()

    def load(self, module: str = "") -> Any:
        return importlib.import_module(f"{self.name}.{module}" if module else self.name)

    def loaded(self, module: str) -> bool:
        return f"{self.name}.{module}" in sys.modules

    def spec(
        self,
        target: str,
        factory: str = "louder",
        source: str | None = None,
        id: str = "",
        holds: str | None = None,
    ) -> PatchSpec:
        target = f"{self.name}.{target}"
        reference = f"{self.name}.{source}" if source else target
        return PatchSpec(
            id=id or target,
            target=target,
            versions=(SpecifierSet(">=1"),),
            source=Source(reference, {"1": fingerprint(reference) or ""}),
            holds=f"{self.name}.{holds}" if holds else reference,
            relies_on=(),
            factory=f"{self.factories}:{factory}",
            why="a test",
            upstream="none: a test",
            remove_when="never",
        )

    def patches(self, *specs: PatchSpec, strict: bool = True) -> PatchSet:
        return PatchSet(self.name, specs, strict=strict)

    def install(self, version: str = "1.0") -> None:
        """Give the package distribution metadata, as an installed release has."""
        info = self.root / f"{self.name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {self.name}\nVersion: {version}\n")
        importlib.invalidate_caches()

    def ledger(self, *targets: str, engine: str = "vllm", **changes: Any) -> Path:
        """Write a ledger for the package as if it were ``engine``; returns its folder."""
        folder = self.root / "ledger"
        folder.mkdir(exist_ok=True)
        entries = [
            {
                "id": target,
                "target": f"{self.name}.{target}",
                "versions": [">=0.5"],
                "factory": f"{self.factories}:louder",
                "why": "a test",
                "upstream": "none: a test",
                "remove_when": "never",
            }
            for target in targets
        ]
        data = {
            "engine": engine,
            "import_name": self.name,
            "distributions": [self.name],
            **FACTS,
            "patches": entries,
            **changes,
        }
        (folder / f"{engine}.yaml").write_text(yaml.safe_dump(data))
        names = [f"{self.name}.{target}" for target in targets]
        hashes = {name: {"1.0": fingerprint(name)} for name in names}
        (folder / f"{engine}.fingerprints.json").write_text(json.dumps(hashes))
        return folder


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    monkeypatch.syspath_prepend(str(tmp_path))
    made = Toy(tmp_path)
    yield made
    for name in list(sys.modules):
        if name.partition(".")[0] in (made.name, made.factories):
            del sys.modules[name]


@pytest.fixture
def engine(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    """An installed toy that fse_patch takes for "vllm", with one patch: core:greet."""
    import fse_patch

    for name in ("FSE_PATCH", "FSE_PATCH_STRICT"):
        monkeypatch.delenv(name, raising=False)
    toy.write("core.py", "def greet():\n    return 'hello'\n")
    toy.install()
    monkeypatch.setattr(ledger, "FOLDER", toy.ledger("core:greet"))
    yield toy
    fse_patch.remove("vllm")


def everything(*owners: ModuleType | type) -> dict[tuple[str, str], int]:
    """Identity of every attribute, by owner and name."""
    return {(o.__name__, name): id(value) for o in owners for name, value in list(vars(o).items())}
