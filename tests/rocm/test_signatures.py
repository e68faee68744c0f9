"""The fake's signatures are AITER's: a committed file, and the script that makes it."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiter_signatures
import pytest

from ..fakes.aiter_profiles import COMING, HEAD, PROFILES, SIGNATURES, function, installed

ROOT = Path(__file__).parents[2]
SEVEN = ["num_shared_experts", "shared_expert_scoring_func"]


def names(state: str, operation: str) -> list[str]:
    return [parameter[0] for parameter in SIGNATURES["states"][state][operation]["parameters"]]


def test_the_file_has_the_states_that_the_script_asks_for() -> None:
    assert list(SIGNATURES["states"]) == [*aiter_signatures.TAGS, HEAD]
    assert {profile.state for profile in PROFILES.values()} <= set(SIGNATURES["states"])
    text = aiter_signatures.FILE.read_text()
    assert text == aiter_signatures.rows(json.loads(text))


def test_what_changed_between_the_states() -> None:
    """Facts that the guards rest on; each is read off AITER's own tags."""
    assert names("v0.1.5", "topk_softmax") == [f"arg{i}" for i in range(5)]
    for state in SIGNATURES["states"]:
        assert (names(state, "topk_softmax")[5:] == SEVEN) == (state not in aiter_signatures.TAGS[:6])
        assert names(state, "fused_moe")[:13] == names(HEAD, "fused_moe")[:13]
        assert not set(COMING) & set(names(state, "fused_moe"))
    hidden = {
        s for s, has in SIGNATURES["states"].items() if "compile_ops" in has["topk_softmax"]["decorators"]
    }
    assert hidden == set(aiter_signatures.TAGS[: aiter_signatures.TAGS.index("v0.1.19")])


@pytest.mark.parametrize("name", PROFILES)
def test_a_fake_has_the_signature_of_its_state_or_hides_it_as_that_does(name: str) -> None:
    profile = PROFILES[name]
    with installed(profile):
        for operation, facts in SIGNATURES["states"][profile.state].items():
            made = (
                function(operation, profile)
                if operation != "topk_softmax"
                else sys.modules["aiter"].topk_softmax
            )
            seen = inspect.signature(made).parameters
            if profile.wrapped and "compile_ops" in facts["decorators"]:
                assert [p.kind.name for p in seen.values()] == ["VAR_POSITIONAL", "VAR_KEYWORD"]
            else:
                extra = list(profile.extra) if operation == "fused_moe" else []
                assert list(seen) == names(profile.state, operation) + extra


SOURCE = """
@compile_ops("module_moe_asm")
def topk_softmax(a: Tensor, b: int = 0, c: str = "") -> None: ...

def topk_sigmoid(weights, *, mode=Mode.ONE):
    return weights
"""


def test_a_definition_is_described() -> None:
    stub, plain = (node for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef))
    assert aiter_signatures.facts_of(stub) == {
        "parameters": [["a"], ["b", "0"], ["c", "''"]],
        "decorators": ["compile_ops"],
        "stub": True,
    }
    assert aiter_signatures.facts_of(plain) == {
        "parameters": [["weights"], ["mode", "Mode.ONE"]],
        "decorators": [],
        "stub": False,
    }


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with every tag, as AITER's has them."""

    def git(*arguments: str) -> None:
        person = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *person, *arguments], check=True, capture_output=True)

    for path, operations in aiter_signatures.FUNCTIONS.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(f"def {name}(a, b=1): ..." for name in operations))
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    for tag in aiter_signatures.TAGS:
        git("tag", tag)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, file: Path, *arguments: Any) -> int:
    monkeypatch.setattr(aiter_signatures, "FILE", file)
    monkeypatch.setattr(sys, "argv", ["aiter_signatures.py", *map(str, arguments)])
    return aiter_signatures.main()


def test_the_script_writes_and_compares(
    monkeypatch: pytest.MonkeyPatch, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("out") / "signatures.json"
    assert run(monkeypatch, file, "--checkout", checkout) == 1
    assert run(monkeypatch, file, "--checkout", checkout, "--write") == 0
    assert run(monkeypatch, file, "--checkout", checkout) == 0
    assert names_in(file, "v0.1.14", "fused_moe") == ["a", "b"]
    # The control: another signature is another file.
    file.write_text(file.read_text().replace('["b", "1"]', '["b", "2"]', 1))
    assert run(monkeypatch, file, "--checkout", checkout) == 1
    assert run(monkeypatch, file, "--checkout", file.parent) == 2


def names_in(file: Path, state: str, operation: str) -> list[str]:
    found = json.loads(file.read_text())["states"][state][operation]
    return [parameter[0] for parameter in found["parameters"]]
