"""``from X import Y`` copies what stood there at the time."""

from __future__ import annotations

import sys

import pytest

from .conftest import Toy, everything


@pytest.fixture
def layers(toy: Toy) -> Toy:
    toy.write("layer/__init__.py", "from {me}.layer.impl import make\n")
    toy.write("layer/impl.py", "def make():\n    return 'made'\n")
    toy.write("early.py", "from {me}.layer import make as build\n\n\ndef use():\n    return build()\n")
    toy.write("late.py", "from {me}.layer import make\n\n\ndef use():\n    return make()\n")
    return toy


class TestDefinition:
    def test_stale_names_are_replaced_and_restored(self, layers: Toy) -> None:
        early, package, impl = layers.load("early"), layers.load("layer"), layers.load("layer.impl")
        before = everything(early, package, impl)
        patches = layers.patches(layers.spec("layer.impl:make"))
        patches.apply()
        assert early.use() == "made!"
        assert early.build is package.make is impl.make
        patches.revert()
        assert everything(early, package, impl) == before

    def test_names_imported_while_patched_are_restored(self, layers: Toy) -> None:
        impl = layers.load("layer.impl")
        original = impl.make
        patches = layers.patches(layers.spec("layer.impl:make"))
        patches.apply()
        late = layers.load("late")
        assert late.use() == "made!"
        patches.revert()
        assert late.make is original

    def test_other_packages_keep_theirs(self, layers: Toy) -> None:
        impl = layers.load("layer.impl")
        outside = type(sys)(f"{layers.name}_outside")
        outside.make = impl.make  # type: ignore[attr-defined]
        sys.modules[outside.__name__] = outside
        original = impl.make
        patches = layers.patches(layers.spec("layer.impl:make"))
        patches.apply()
        assert outside.make is original
        patches.revert()
        del sys.modules[outside.__name__]

    def test_a_replacement_that_the_engine_had_already_keeps_its_own_names(self, layers: Toy) -> None:
        layers.write("two.py", "class Old:\n    pass\n\n\nclass New:\n    pass\n")
        two = layers.load("two")
        before = everything(two)
        factories = layers.root / f"{layers.factories}.py"
        factories.write_text(f"from {layers.name}.two import New\n\n\ndef other(original):\n    return New\n")
        patches = layers.patches(layers.spec("two:Old", "other"))
        patches.apply()
        assert two.Old is two.New
        patches.revert()
        assert everything(two) == before


class TestImportedName:
    def test_only_that_binding_is_replaced(self, layers: Toy) -> None:
        early, late, impl = layers.load("early"), layers.load("late"), layers.load("layer.impl")
        before = everything(early, late, impl)
        patches = layers.patches(layers.spec("late:make", source="layer.impl:make"))
        patches.apply()
        assert late.use() == "made!"
        assert (early.use(), impl.make()) == ("made", "made")
        patches.revert()
        assert everything(early, late, impl) == before
