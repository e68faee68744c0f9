"""`fse-patch plan`: the decision for a checkpoint, from config.json and safetensors headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import settings
from ..errors import RefusedError
from ..fusion_core.checkpoint.weight_files import AUTO
from ..fusion_core.decision.decide import decide_roles
from ..fusion_core.decision.outcome import Decision, Stock
from ..fusion_core.decision.policy_file import load_policy
from ..fusion_core.decision.proven import proven_platforms
from .arguments import engine_option, source_of
from .output import print_json, print_table


def command(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a checkpoint, or ORG/NAME of the hub.")],
    engine: Annotated[str, engine_option()],
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
    decisions = decide_roles(source_of(checkpoint, revision), engine, rules, load_format)
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
    proven = proven_platforms(decision) if told["fuse"] else []
    note = ""
    if told["fuse"] and not proven:
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
        "policy_hash": decision.policy_hash,
        "formats": list(decision.formats),
        "proven": proven,
        "note": note,
    }
