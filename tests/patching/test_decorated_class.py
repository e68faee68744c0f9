"""A class decorator puts its own function in a method's place: the ledger says which one to expect."""

from __future__ import annotations

import pytest

from fse_patch.errors import RefusedError

from .conftest import Toy

CORE = """
def shouting(cls):
    def talk(self):
        return "TALK"

    cls.talk = talk
    return cls


@shouting
class Parrot:
    def talk(self):
        return "talk"
"""
HELD = "core:shouting.<locals>.talk"


def test_the_named_decorator_is_accepted(toy: Toy) -> None:
    toy.write("core.py", CORE)
    core = toy.load("core")
    original = core.Parrot.talk
    patches = toy.patches(toy.spec("core:Parrot.talk", holds=HELD))
    patches.apply()
    assert core.Parrot().talk() == "TALK!"
    patches.revert()
    assert core.Parrot.talk is original


@pytest.mark.parametrize("holds", [None, "core:quietening.<locals>.talk"])
def test_another_function_in_its_place_is_refused(toy: Toy, holds: str | None) -> None:
    toy.write("core.py", CORE)
    core = toy.load("core")
    with pytest.raises(RefusedError, match="fingerprint"):
        toy.patches(toy.spec("core:Parrot.talk", holds=holds)).apply()
    assert core.Parrot().talk() == "TALK"
