"""The hash follows the code, not its comments, docstrings, place or the Python that reads it."""

from __future__ import annotations

import sys

import pytest

from fse_patch.adapters.patching.source import fingerprint
from fse_patch.errors import FsePatchError

from .conftest import Toy

CODE = '''
def scale(x, *, factor=None):
    """What it does."""
    if factor is None:  # why
        factor = 1
    return x * factor
'''


def of(toy: Toy, code: str, name: str = "scale") -> str | None:
    toy.write("code.py", code)
    return fingerprint(f"{toy.name}.code:{name}")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# why", "# another reason"),
        ("What it does.", "Something else."),
        ('    """What it does."""\n', ""),
        ("return x * factor", "return (x *\n            factor)"),
        ("def scale", "import os\n\n\ndef other():\n    pass\n\n\ndef scale"),
    ],
)
def test_same_code_same_hash(toy: Toy, old: str, new: str) -> None:
    assert old in CODE
    assert of(toy, CODE.replace(old, new)) == of(toy, CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x * factor", "x + factor"),
        ("factor = 1", "factor = 1.0"),
        ("factor = 1", "factor = True"),
        ("factor=None", "factor=False"),
        ("is None", "is not None"),
        ("(x, *, ", "(x, "),
        ("def scale", "@staticmethod\ndef scale"),
        ("    return x * factor\n", "    return x * factor\n\n\ndef scale(x):\n    return x\n"),
    ],
)
def test_one_token_another_hash(toy: Toy, old: str, new: str) -> None:
    assert old in CODE
    assert of(toy, CODE.replace(old, new)) != of(toy, CODE)


def test_does_not_import(toy: Toy) -> None:
    toy.write("__init__.py", "raise RuntimeError('imported')\n")
    assert of(toy, "raise RuntimeError('imported')\n" + CODE)
    assert toy.name not in sys.modules


class TestWhereADefinitionStands:
    def test_method_nested_class_and_whole_class(self, toy: Toy) -> None:
        code = "class A:\n    class B:\n        def f(self): return 1\n    def f(self): return 2\n"
        hashes = {name: of(toy, code, name) for name in ("A", "A.B", "A.B.f", "A.f")}
        assert None not in hashes.values()
        assert len(set(hashes.values())) == 4

    def test_under_if_and_try(self, toy: Toy) -> None:
        code = "if True:\n    try:\n        f = None\n    except ImportError:\n        def f(): pass\n"
        assert of(toy, code, "f")

    def test_constant(self, toy: Toy) -> None:
        assert of(toy, "LIMIT: int = 1\n", "LIMIT") != of(toy, "LIMIT: int = 2\n", "LIMIT")

    @pytest.mark.parametrize("name", ["absent", "scale.absent", "scale.x"])
    def test_absent(self, toy: Toy, name: str) -> None:
        assert of(toy, CODE, name) is None

    def test_an_import_is_no_definition(self, toy: Toy) -> None:
        assert of(toy, "from os import path\n", "path") is None

    @pytest.mark.parametrize(
        "module", ["absent_package", "absent_package.sub", "sys", "{toy}.absent", "{toy}.a.b"]
    )
    def test_absent_module(self, toy: Toy, module: str) -> None:
        assert fingerprint(f"{module.format(toy=toy.name)}:f") is None

    def test_in_given_site_packages_only(self, toy: Toy) -> None:
        toy.write("code.py", CODE)
        reference = f"{toy.name}.code:scale"
        assert fingerprint(reference, [str(toy.root)]) == fingerprint(reference)
        assert fingerprint(reference, [str(toy.root / "elsewhere")]) is None


@pytest.mark.parametrize("reference", ["module", "module:", ":name", "a b:c", "a..b:c", "a:b.<locals>.c"])
def test_malformed_reference(reference: str) -> None:
    with pytest.raises(FsePatchError):
        fingerprint(reference)


def test_unparsable_source_is_named(toy: Toy) -> None:
    with pytest.raises(FsePatchError, match=r"code\.py"):
        of(toy, "def f(:\n", "f")


def test_hash_is_the_same_on_every_python(toy: Toy) -> None:
    """A constant: every interpreter that runs this test has to find it."""
    code = '''
    @decorator(1, key=None)
    async def f(a: int, /, b=..., *c, d: "str" = b"x", **e) -> None:
        """Docstring."""
        x = f"a{a!r:>{b}}" f"{d}" "é" if a else {**e, "k": 1e3j}
        with open(x) as y, open(x):
            async for z in y:
                yield lambda q, *, w: (q := [*z, -1][1:, ...])
        match a:
            case {"k": [1, *_]} | None:
                raise ValueError from None
    '''
    assert of(toy, code, "f") == "76c661a5bc6301aa"
