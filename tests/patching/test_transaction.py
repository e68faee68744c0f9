"""Put in, all or none; take out, by identity."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from fse_patch.adapters.patching.spec import PatchSpec
from fse_patch.adapters.patching.transaction import APPLIED, NOT_APPLIED, WAITING
from fse_patch.errors import FsePatchError, RefusedError

from .conftest import Toy, everything

CORE = """
class Base:
    def inherited(self):
        return "inherited"


class Child(Base):
    def method(self):
        return "method"

    @classmethod
    def of_class(cls):
        return cls.__name__

    @staticmethod
    def static():
        return "static"

    @property
    def value(self):
        return "value"

    def __init__(self):
        self.made = True


def function():
    return "function"


class Other:
    pass
"""


@pytest.fixture
def core(toy: Toy) -> Toy:
    toy.write("core.py", CORE)
    return toy


class TestEveryKindOfAttribute:
    def specs(self, toy: Toy) -> list[PatchSpec]:
        return [
            toy.spec("core:function"),
            toy.spec("core:Child.method"),
            toy.spec("core:Child.of_class"),
            toy.spec("core:Child.static"),
            toy.spec("core:Child.value", "louder_property"),
            toy.spec("core:Child.inherited", source="core:Base.inherited"),
            toy.spec("core:Other", "subclass"),
        ]

    def test_is_replaced(self, core: Toy) -> None:
        module = core.load("core")
        patches = core.patches(*self.specs(core))
        patches.apply()
        child = module.Child()
        assert module.function() == "function!"
        assert (child.method(), child.value, child.inherited()) == ("method!", "value!", "inherited!")
        assert (module.Child.of_class(), child.of_class()) == ("Child!", "Child!")
        assert (module.Child.static(), child.static()) == ("static!", "static!")
        assert module.Other.patched
        assert module.Base().inherited() == "inherited"
        patches.revert()

    def test_comes_back_by_identity(self, core: Toy) -> None:
        module = core.load("core")
        owners = (module, module.Child, module.Base, module.Other)
        before = everything(*owners)
        patches = core.patches(*self.specs(core))
        patches.apply()
        assert everything(*owners) != before
        patches.revert()
        assert everything(*owners) == before
        assert "inherited" not in vars(module.Child)

    def test_replacement_is_a_plain_function(self, core: Toy) -> None:
        module = core.load("core")
        patches = core.patches(core.spec("core:Child.method"))
        patches.apply()
        assert type(vars(module.Child)["method"]).__name__ == "function"
        assert module.Child.method.__name__ == "method"
        patches.revert()


def test_twice_is_once(core: Toy) -> None:
    module = core.load("core")
    patches = core.patches(core.spec("core:function"))
    patches.apply()
    once = module.function
    patches.apply()
    assert module.function is once
    assert module.function() == "function!"
    patches.revert()
    assert module.function() == "function"
    patches.revert()


def test_two_patches_of_one_target_nest_and_unnest(core: Toy) -> None:
    module = core.load("core")
    original = module.function
    patches = core.patches(core.spec("core:function", id="a"), core.spec("core:function", id="b"))
    patches.apply()
    assert module.function() == "function!!"
    patches.revert()
    assert module.function is original


def test_apply_again_after_revert(core: Toy) -> None:
    module = core.load("core")
    patches = core.patches(core.spec("core:function"))
    for _ in range(2):
        patches.apply()
        assert module.function() == "function!"
        patches.revert()
        assert module.function() == "function"


class TestFailureLeavesNothing:
    @pytest.mark.parametrize(
        ("factory", "text"),
        [
            ("failing", "ValueError: boom"),
            ("nothing", "returned the original"),
            ("callable_object", "must return a plain function"),
            ("absent", "absent"),
        ],
    )
    def test_in_the_last_factory(self, core: Toy, factory: str, text: str) -> None:
        module = core.load("core")
        before = everything(module, module.Child)
        last = core.spec("core:Child.static" if factory == "absent" else "core:Child.method", factory)
        patches = core.patches(core.spec("core:function"), core.spec("core:Other", "subclass"), last)
        with pytest.raises(FsePatchError, match=text):
            patches.apply()
        assert everything(module, module.Child) == before
        assert {patches.state(p) for p in patches.patches} == {NOT_APPLIED}

    def test_in_setattr(self, core: Toy) -> None:
        core.write(
            "guarded.py",
            """
            class Meta(type):
                def __setattr__(cls, name, value):
                    if getattr(value, "__wrapped__", None) is not None:
                        raise AttributeError("read-only")
                    super().__setattr__(name, value)


            class Guarded(metaclass=Meta):
                def method(self):
                    return "method"
            """,
        )
        module, guarded = core.load("core"), core.load("guarded")
        before = everything(module, guarded.Guarded)
        patches = core.patches(core.spec("core:function"), core.spec("guarded:Guarded.method"))
        with pytest.raises(FsePatchError, match="AttributeError: read-only"):
            patches.apply()
        assert everything(module, guarded.Guarded) == before

    def test_later_imports_stay_stock(self, core: Toy) -> None:
        core.write("late.py", "def late():\n    return 'late'\n")
        core.load("core")
        patches = core.patches(core.spec("core:function", "failing"), core.spec("late:late"))
        with pytest.raises(FsePatchError):
            patches.apply()
        assert core.load("late").late() == "late"

    def test_can_be_applied_once_the_cause_is_gone(self, core: Toy) -> None:
        module = core.load("core")
        patches = core.patches(core.spec("core:function", "added_later"))
        with pytest.raises(FsePatchError):
            patches.apply()
        factories: Any = importlib.import_module(core.factories)
        factories.added_later = factories.louder
        patches.apply()
        assert module.function() == "function!"
        patches.revert()


def test_replaced_by_someone_else_is_refused(core: Toy) -> None:
    module = core.load("core")
    patch = core.spec("core:function")
    module.function = lambda: "theirs"
    with pytest.raises(RefusedError, match="another plugin") as caught:
        core.patches(patch).apply()
    assert caught.value.reason == "fingerprint"
    assert module.function() == "theirs"


def test_what_someone_put_on_top_is_removed_with_a_warning(
    core: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    module = core.load("core")
    original = module.function
    patches = core.patches(core.spec("core:function"))
    patches.apply()
    module.function = lambda: "theirs"
    patches.revert()
    assert module.function is original
    assert "someone else" in caplog.text


def test_states(core: Toy) -> None:
    patches = core.patches(core.spec("core:function"))
    patches.apply()
    assert patches.state(patches.patches[0]) == WAITING
    core.load("core")
    assert patches.state(patches.patches[0]) == APPLIED
    patches.revert()
