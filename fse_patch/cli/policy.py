"""`fse-patch policy`: which rule decides a checkpoint and on what evidence; and a check of policy files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import settings
from ..errors import RefusedError
from ..fusion_core.decision.explain import explain as explain_role
from ..fusion_core.decision.policy_file import load_policy, read_rules
from ..fusion_core.evidence.gather import read_evidence
from ..patches import ENGINES
from .arguments import engine_option, source_of
from .output import print_json, print_table, ranges, say

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Explain a decision rule by rule, or check a policy file.",
)


@app.command()
def explain(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a checkpoint, or ORG/NAME of the hub.")],
    engine: Annotated[str, engine_option()] = ENGINES[0],
    policy: Annotated[Path | None, typer.Option(help="Your own policy file; its rules come first.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the rule that fired and the evidence it saw. Exit status: 0 fuses, 3 refused, 2 bad input."""
    policy_file = policy or settings.load().policy_file
    rules = load_policy(policy_file)
    evidence = read_evidence(source_of(checkpoint), engine)
    report: dict[str, Any] = {
        "engine": engine,
        "model_type": evidence.model_type,
        "policy": str(policy_file) if policy_file else "default",
        "policy_hash": rules.hash,
        "headers": evidence.headers,
        **explain_role(evidence, engine, "main", rules),
    }
    if "draft" in evidence.roles:
        report["draft"] = explain_role(evidence, engine, "draft", rules)
    if json:
        print_json(report)
    else:
        said = "fuses" if report["fuse"] else f"refused: {report['reason']}"
        say(f"{said}: {report['detail']}", "green" if report["fuse"] else "red")
        print_table(f"{checkpoint} in {engine}", _table(report))
    if not report["fuse"]:
        raise typer.Exit(RefusedError.exit_status)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A policy file of your own.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Validate a policy file, alone and over the default one. Exit status: 0 valid, 2 not."""
    rules = read_rules(file)
    effective = load_policy(file)
    report: dict[str, Any] = {
        "valid": True,
        "file": str(file),
        "rules": [rule.id for rule in rules],
        "policy_hash": effective.hash,
    }
    if json:
        print_json(report)
    else:
        say(f"{file}: valid; rules before the default ones: {', '.join(report['rules']) or 'none'}", "green")


def _table(report: dict[str, Any]) -> dict[str, Any]:
    """Return ``report`` with its lists of objects as rows of their own."""
    shown: dict[str, Any] = {}
    for key, value in report.items():
        if key == "draft":
            shown |= {f"draft.{name}": row for name, row in _table(value).items()}
        elif key == "quantisation":
            shown[key] = "; ".join(
                f"{q['source']}: {q['method']}" + (f" ({q['scheme']})" if q["scheme"] else "") for q in value
            )
        elif key == "layers":
            for group in value:
                head = f"layers {ranges(group['layers'])}"
                rest = {k: v for k, v in group.items() if k != "layers" and v != ""}
                shown[head] = rest
        elif key == "formats":
            shown[key] = ", ".join(value)
        else:
            shown[key] = value
    return shown
