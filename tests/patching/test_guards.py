"""A release that was not read is refused, with a code, a name and what to do."""

from __future__ import annotations

import pytest
import yaml
from packaging.version import Version

from fse_patch.adapters.patching import guards, ledger, standing
from fse_patch.adapters.patching.spec import PatchSpec
from fse_patch.errors import FsePatchError, RefusedError

from .conftest import Toy

SOURCE = "def greet():\n    return 'hello'  # politely\n"


@pytest.fixture
def book(toy: Toy) -> ledger.Ledger:
    toy.write("core.py", SOURCE)
    toy.write(
        "model.py",
        "from {me}.core import greet\n\n\nclass A:\n    def f(self): pass\n\n\nclass B(A):\n    pass\n",
    )
    toy.install()
    return ledger.load("vllm", toy.ledger("core:greet"))


def check(book: ledger.Ledger, version: str = "1.0") -> tuple[PatchSpec, ...]:
    """The patches for a release, all of them as expected."""
    here = standing.standing_of(book, version)
    for error in here.problems.values():
        raise error
    return here.patches


class TestVersion:
    @pytest.mark.parametrize("version", ["1.0", "1.0+cpu", "1.0+cu129"])
    def test_listed(self, book: ledger.Ledger, version: str) -> None:
        assert check(book, version) == book.patches
        assert standing.standing_of(book, version).remark == ""

    @pytest.mark.parametrize("version", ["1.1", "1.0.post1", "1.1.dev3+gabc"])
    def test_new(self, book: ledger.Ledger, version: str) -> None:
        assert check(book, version) == book.patches
        here = standing.standing_of(book, version)
        assert here.remark == f"release {version} is new, its seams are those of 1.0"

    @pytest.mark.parametrize("version", ["0.9", "1.0rc1", "1.0.dev3+gabc"])
    def test_older(self, book: ledger.Ledger, version: str) -> None:
        with pytest.raises(RefusedError, match="older than every listed release") as caught:
            standing.standing_of(book, version)
        assert caught.value.reason == "version.untested"

    def test_any_specifier_may_match(self, toy: Toy) -> None:
        assert toy.spec("core:greet").is_for(Version("2.0.dev1"))
        assert not toy.spec("core:greet").is_for(Version("0.9"))

    def test_installed(self, book: ledger.Ledger, toy: Toy) -> None:
        assert guards.engine_version(book) == "1.0"
        assert guards.engine_version(book, [str(toy.root)]) == "1.0"

    def test_not_installed(self, book: ledger.Ledger, toy: Toy) -> None:
        with pytest.raises(FsePatchError, match="not installed"):
            guards.engine_version(book, [str(toy.root / "elsewhere")])


class TestFingerprint:
    def test_untouched_source_passes(self, book: ledger.Ledger) -> None:
        check(book)

    @pytest.mark.parametrize(("old", "new"), [("politely", "rudely"), ("():\n", '():\n    """Greet."""\n')])
    def test_comments_and_docstrings_do_not_count(
        self, toy: Toy, book: ledger.Ledger, old: str, new: str
    ) -> None:
        toy.write("core.py", SOURCE.replace(old, new))
        check(book)

    def test_one_token_is_refused(self, toy: Toy, book: ledger.Ledger) -> None:
        toy.write("core.py", SOURCE.replace("'hello'", "'hallo'"))
        with pytest.raises(RefusedError) as caught:
            check(book)
        assert caught.value.reason == "fingerprint"
        for part in ("core:greet", f"{toy.name}.core:greet", "fse-patch patches", "1.0"):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_what_a_patch_relies_on_counts(self, toy: Toy) -> None:
        toy.write("core.py", SOURCE + "\n\ndef helper():\n    return 1\n")
        toy.install()
        folder = toy.ledger("core:greet", "core:helper")
        book = ledger.load("vllm", folder)
        greet, helper = book.patches
        object.__setattr__(greet, "relies_on", (helper.source,))
        check(book)
        toy.write("core.py", SOURCE + "\n\ndef helper():\n    return 2\n")
        with pytest.raises(RefusedError, match="helper"):
            check(book)

    @pytest.mark.parametrize(("versions", "passes"), [("<1.0", True), ("<=1.0", False)])
    def test_what_is_gone_counts_where_it_is_relied_on(
        self, toy: Toy, book: ledger.Ledger, versions: str, passes: bool
    ) -> None:
        folder = toy.root / "ledger"
        data = yaml.safe_load((folder / "vllm.yaml").read_text())
        data["patches"][0]["relies_on"] = [{"name": f"{toy.name}.core:gone", "versions": versions}]
        (folder / "vllm.yaml").write_text(yaml.safe_dump(data))
        book = ledger.load("vllm", folder)
        if passes:
            assert len(check(book, "1.0+cpu")) == 1
        else:
            with pytest.raises(RefusedError, match="core:gone is not defined"):
                check(book, "1.0+cpu")

    def test_no_known_fingerprint_is_refused(self, toy: Toy, book: ledger.Ledger) -> None:
        (toy.root / "ledger" / "vllm.fingerprints.json").unlink()
        book = ledger.load("vllm", toy.root / "ledger")
        with pytest.raises(RefusedError, match="fingerprint"):
            check(book)


class TestTargetThatIsNotItsSource:
    def test_imported_name_and_inherited_method_pass(self, toy: Toy, book: ledger.Ledger) -> None:
        assert guards.guard(toy.spec("model:greet", source="core:greet")) == ""
        assert guards.guard(toy.spec("model:B.f", source="model:A.f")) == ""

    @pytest.mark.parametrize(
        ("target", "source"), [("model:absent", "core:greet"), ("model:Absent.f", "model:A.f")]
    )
    def test_unbound_is_refused(self, toy: Toy, book: ledger.Ledger, target: str, source: str) -> None:
        assert "does not bind" in guards.guard(toy.spec(target, source=source))

    def test_override_is_refused(self, toy: Toy, book: ledger.Ledger) -> None:
        toy.write("over.py", "class A:\n    def f(self): pass\n\n\nclass B(A):\n    def f(self): pass\n")
        assert "definition of its own" in guards.guard(toy.spec("over:B.f", source="over:A.f"))


class TestFactory:
    def test_is_found_without_running_it(self, toy: Toy, book: ledger.Ledger) -> None:
        guards.check_factory(toy.spec("core:greet"))

    def test_absent(self, toy: Toy, book: ledger.Ledger) -> None:
        with pytest.raises(FsePatchError, match="no factory"):
            guards.check_factory(toy.spec("core:greet", "absent"))
