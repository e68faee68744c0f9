"""Pages: links lead somewhere, and every command in them is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import make_docs as docs
import pytest
import typer
from demo import MODELS
from envs import matrix

from fse_patch.cli.app import app
from fse_patch.fusion_core.reasons import REASONS
from fse_patch.launch.command import engine_of_command, read

ROOT = Path(__file__).parents[2]
PAGES = [page for page in docs.pages() if page.parent != ROOT / "benchmarks"]
# Of a line in a block of code: what is a command of ours, or of an engine.
OURS = re.compile(
    r"^ {4}(?P<words>(?:[A-Z_]+=\S+ )*(?:fse-patch|make|python3?|vllm|pip) .*?)(?: {2,}#.*)?$", re.MULTILINE
)


def commands() -> list[tuple[str, str]]:
    """Every command of a block of code, with its page."""
    return [
        (page.name, match["words"].partition(" # ")[0].strip())
        for page in PAGES
        for match in OURS.finditer(page.read_text(encoding="utf-8"))
    ]


def problem(command: str) -> str:
    """What is wrong with a command, or nothing."""
    words = shlex.split(command)
    if engine_of_command(words) is not None and words[0] != "fse-patch":
        read(words, "", {})
        return ""
    while "=" in words[0]:
        words.pop(0)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        named = [word for word in words[1:] if "=" not in word]
        return "" if set(named) <= set(targets) else f"no target {named}"
    if words[0].startswith("python") and words[1] != "-m":
        script = words[1].removeprefix("REPOSITORY/")
        return "" if (ROOT / script).exists() or words[1].startswith("-") else f"no script {script}"
    if words[0] != "fse-patch":
        return ""
    return usage(words[1:])


def usage(words: list[str]) -> str:
    """What the command line says of arguments, without running anything."""
    group = typer.main.get_command(app)
    if words[0].startswith("-"):
        return (
            ""
            if words[0] in ("--version", "--help", "-h", "--install-completion")
            else f"no option {words[0]}"
        )
    context = group.make_context("fse-patch", words, resilient_parsing=True)
    command = group.get_command(context, words[0])
    if command is None:
        return f"no command {words[0]}"
    rest = words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    if "--" in rest:
        read(rest[rest.index("--") + 1 :], "", {})
    try:
        command.make_context(words[0], list(rest))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_links_lead_somewhere() -> None:
    assert docs.broken() == []


def test_a_broken_link_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](gone.md#part) `[b](code.md)` [c](https://example.org/)")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "pages", lambda: [page])
    assert docs.broken() == ["page.md: gone.md"]


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_are_commands(page: str, command: str) -> None:
    assert problem(command) == ""


def leaves(command: Any, name: str) -> list[tuple[str, Any]]:
    """Every command below a group, with its words."""
    if not hasattr(command, "list_commands"):
        return [(name, command)]
    context = command.make_context(name, [], resilient_parsing=True)
    below = [(word, command.get_command(context, word)) for word in command.list_commands(context)]
    return [leaf for word, one in below for leaf in leaves(one, f"{name} {word}".strip())]


def test_every_command_takes_json_as_the_page_says() -> None:
    found = leaves(typer.main.get_command(app), "")
    assert {"plan", "policy check", "tuned remove"} <= {name for name, _ in found}
    without = [name for name, one in found if not any("--json" in option.opts for option in one.params)]
    assert without == []


def test_a_wrong_command_is_seen() -> None:
    assert problem("make nothing") != ""
    assert problem("python3 ci/nothing.py") != ""
    assert problem("fse-patch plan MODEL --nothing") != ""
    assert problem("fse-patch tune MODEL") != ""
    with pytest.raises(Exception, match="no flag"):
        problem("vllm serve MODEL --nothing-of-the-kind")


def codes(text: str) -> set[str]:
    """What stands in a text as the code of a refusal."""
    kinds = "|".join({code.partition(".")[0] for code in REASONS if "." in code})
    # Files, and keys of a report, that look like one.
    others = {"config.json", "config.py", "upstream.detail"}
    return set(re.findall(rf"`((?:{kinds})\.[a-z_0-9]+)`", text)) - others


def test_codes_of_refusals_are_codes() -> None:
    told = {code for page in PAGES if page.name != "CHANGELOG.md" for code in codes(page.read_text())}
    assert told - set(REASONS) == set()
    assert {"quant.mixed", "parallel.ep"} <= told
    assert codes("`parallel.nothing` and `not.a_code`") == {"parallel.nothing"}, "control"


def test_every_page_is_in_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    for page in docs.pages():
        assert str(page.relative_to(ROOT)) in text


def test_the_readme_opens_with_what_it_does() -> None:
    text = (ROOT / "README.md").read_text()
    heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert heads[:4] == ["How fast", "Install", "Does it work for me?", "Use it"]
    assert text.index("*Stock* means") < text.index("## How fast")
    assert "pip install ." in text


def test_the_readme_tries_what_make_demo_builds() -> None:
    text = (ROOT / "README.md").read_text()
    shown = {row["name"] for row in matrix()["engines"] if row.get("demo")}
    assert set(re.findall(r"\.venvs/([a-z0-9.-]+)/bin", text)) == shown
    (recipe,) = re.findall(r"ci/tiny_checkpoints\.py \.\./tiny (\w+)", text)
    assert all(recipe in {model.recipe for model in models} for models in MODELS.values())
    assert f"mv {recipe} MODEL" in text
