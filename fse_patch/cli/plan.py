"""`fse-patch plan`: the decision for a checkpoint, from config.json and safetensors headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import settings
from ..errors import RefusedError
from ..fusion_core.checkpoint.hub import locate
from ..fusion_core.checkpoint.weight_files import AUTO
from ..fusion_core.decision.decide import decide_roles
from ..fusion_core.decision.outcome import Decision, Merged, MoeSpec, Stock, paired
from ..fusion_core.decision.policy_file import load_policy
from ..fusion_core.decision.proven import proven_platforms
from ..patches import ENGINES
from .output import print_json, print_table


def command(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a checkpoint, or ORG/NAME of the hub.")],
    engine: Annotated[str, typer.Option(help=f"One of {', '.join(ENGINES)}.")],
    policy: Annotated[Path | None, typer.Option(help="Your own policy file; its rules come first.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    platform: Annotated[str | None, typer.Option(help="Add facts on a platform: cpu, cuda, rocm.")] = None,
    engine_version: Annotated[str | None, typer.Option(help="Add facts on a release.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a name of the hub.")] = None,
    load_format: Annotated[str, typer.Option(help="The engine's --load-format.")] = AUTO,
) -> None:
    """Run the command. Exit status: 0 fuses, 3 refused, 2 bad input."""
    # Without --policy, the file that serving would use.
    rules = load_policy(policy or settings.load().policy_file)
    decisions = decide_roles(locate(checkpoint, revision), engine, rules, load_format)
    if settings.load().layout == "paired":
        decisions = {role: paired(decision) for role, decision in decisions.items()}
    report = plan_report(decisions["main"])
    if "draft" in decisions:
        report["draft"] = plan_report(decisions["draft"])
    if platform is not None or engine_version is not None:
        from ..fusion_core.decision.native import runtime_report

        report["runtime"] = runtime_report(decisions["main"], platform, engine_version)
    print_json(report) if json else print_table(f"{checkpoint} in {engine}", report)
    if isinstance(decisions["main"], Stock):
        raise typer.Exit(RefusedError.exit_status)


def plan_report(decision: Decision) -> dict[str, Any]:
    """Return one role's decision under the keys that other tools rely on; null where nothing is known."""
    told = decision.to_dict()
    layout, routing = told["layout"] or {}, told["routing"] or {}
    merged = isinstance(decision, Merged)
    proven = proven_platforms(decision) if merged else []
    pairing = decision.pairing
    note = ""
    if merged and not proven:
        note = (
            f"{decision.engine} refuses this for now (quant.unproven): {', '.join(decision.formats)} was not "
            "run fused and compared there yet; FSE_PATCH_ALLOW_UNPROVEN=1 tries it"
        )
    return {
        **{key: told[key] for key in ("fuse", "reason", "detail", "rule", "engine", "model_type")},
        **{key: layout.get(key) for key in ("num_routed", "num_shared_slots", "top_k")},
        "moe_layers": list(told["moe_layers"]),
        "fused_layers": list(told["fused_layers"]),
        "scoring": routing.get("scoring"),
        "shared_weight": told["shared_weight"],
        "routed_scaling_factor": routing.get("routed_scaling_factor"),
        "weight_layout": told["weight_layout"],
        # Whether it may run with weights that stay apart: ok, or a refusal code.
        "pairing": "ok" if isinstance(pairing, MoeSpec) else pairing.code if pairing else "family.unknown",
        "policy_hash": decision.policy_hash,
        "formats": list(decision.formats),
        "proven": proven,
        "note": note,
    }
