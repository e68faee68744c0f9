"""Before or after the engine is imported, it ends the same."""

from __future__ import annotations

import importlib
import sys

import pytest

from fse_patch.adapters.patching.transaction import PatchSet
from fse_patch.errors import FsePatchError

from .conftest import Toy


@pytest.fixture
def pair(toy: Toy) -> Toy:
    toy.write("layer.py", "def make():\n    return 'made'\n")
    toy.write("model.py", "from {me}.layer import make\n\n\ndef use():\n    return make()\n")
    return toy


@pytest.mark.parametrize("first", [[], ["layer"], ["layer", "model"]])
def test_imported_before_or_after(pair: Toy, first: list[str]) -> None:
    for module in first:
        pair.load(module)
    patches = pair.patches(pair.spec("layer:make"), pair.spec("model:use"))
    patches.apply()
    assert not first or pair.loaded("layer")
    assert bool(first) or not pair.loaded("layer")
    assert pair.load("model").use() == "made!!"
    patches.revert()
    assert pair.load("model").use() == "made"


def test_removed_before_import(pair: Toy) -> None:
    patches = pair.patches(pair.spec("layer:make"))
    patches.apply()
    patches.revert()
    assert pair.load("model").use() == "made"


def test_applied_again_before_import_is_put_in_once(pair: Toy) -> None:
    patches = pair.patches(pair.spec("layer:make"))
    patches.apply()
    patches.revert()
    patches.apply()
    assert pair.load("model").use() == "made!"
    patches.revert()


def test_a_factory_may_import_the_engine(pair: Toy) -> None:
    pair.load("layer")
    factories = pair.root / f"{pair.factories}.py"
    factories.write_text(f"import {pair.name}.model\n" + factories.read_text())
    patches = pair.patches(pair.spec("layer:make"), pair.spec("model:use"))
    patches.apply()
    assert pair.load("model").use() == "made!!"
    patches.revert()


class TestFailureDuringImport:
    def test_strict_fails_the_import_each_time_and_reverts(self, pair: Toy) -> None:
        layer = pair.load("layer")
        original = layer.make
        patches = pair.patches(pair.spec("layer:make"), pair.spec("model:use", "failing"))
        patches.apply()
        assert layer.make is not original
        for _ in range(2):
            with pytest.raises(FsePatchError, match="boom"):
                pair.load("model")
            assert not pair.loaded("model")
        assert layer.make is original
        patches.revert()
        assert pair.load("model").use() == "made"

    def test_not_strict_goes_on_stock(self, pair: Toy) -> None:
        layer = pair.load("layer")
        original = layer.make
        patches = pair.patches(pair.spec("layer:make"), pair.spec("model:use", "failing"), strict=False)
        patches.apply()
        assert pair.load("model").use() == "made"
        assert layer.make is original
        assert patches.failure is not None

    def test_not_strict_inside_a_factory_takes_all_out(self, pair: Toy) -> None:
        layer = pair.load("layer")
        original = layer.make
        factories = pair.root / f"{pair.factories}.py"
        factories.write_text(f"import {pair.name}.model\n" + factories.read_text())
        patches = pair.patches(pair.spec("layer:make"), pair.spec("model:use", "failing"), strict=False)
        with pytest.raises(FsePatchError, match="boom"):
            patches.apply()
        assert layer.make is original

    def test_served_by_an_engine_it_ends_the_process(
        self, pair: Toy, capsys: pytest.CaptureFixture[str]
    ) -> None:
        patches = pair.patches(pair.spec("model:use", "failing"))
        patches.exits = True
        patches.apply()
        with pytest.raises(SystemExit) as caught:
            importlib.import_module(f"{pair.name}.model")
        assert caught.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
        patches.revert()

    @pytest.mark.parametrize("exits", [True, False])
    def test_once_something_is_built_it_stops_in_any_case(
        self, pair: Toy, capsys: pytest.CaptureFixture[str], exits: bool
    ) -> None:
        layer = pair.load("layer")
        original, built = layer.make, []
        specs = (pair.spec("layer:make"), pair.spec("model:use", "failing"))
        patches = PatchSet(pair.name, specs, strict=False, building=lambda: bool(built))
        patches.exits = exits
        patches.apply()
        built.append(layer.make())
        with pytest.raises(SystemExit if exits else FsePatchError):
            importlib.import_module(f"{pair.name}.model")
        assert layer.make is original
        patches.revert()


def test_revert_forgets_modules_imported_later(pair: Toy) -> None:
    patches = pair.patches(pair.spec("layer:make"))
    patches.apply()
    pair.load("model")
    patches.revert()
    del sys.modules[f"{pair.name}.layer"]
    assert pair.load("layer").make() == "made"
