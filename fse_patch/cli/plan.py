"""`fse-patch plan`: will a checkpoint, or a launch command, be served fused? No engine, no GPU is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import settings
from ..errors import FsePatchError, RefusedError
from ..fusion_core.checkpoint.sources import CONFIG_NAME
from ..fusion_core.checkpoint.weight_files import AUTO
from ..fusion_core.decision.decide import decide_roles
from ..fusion_core.decision.outcome import Decision, Merged, MoeSpec, Stock, in_layout
from ..fusion_core.decision.policy_file import load_policy
from ..fusion_core.decision.proven import proven_platforms
from .arguments import engine_option, source_of, words_of
from .output import Colour, print_json, print_table, say

if TYPE_CHECKING:
    from ..launch.verdict import Served
    from .target import Target

COLOURS: dict[Served, Colour] = {"fused": "green", "native": "yellow", "stock": "red"}
SERVE = {"vllm": "vllm serve", "sglang": "python -m sglang.launch_server --model-path"}


def command(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a checkpoint, or ORG/NAME of the hub.")],
    launch: Annotated[
        list[str] | None,
        typer.Argument(
            help="Behind --: the command that starts the server, such as vllm serve MODEL --tp 2."
        ),
    ] = None,
    engine: Annotated[str | None, engine_option()] = None,
    policy: Annotated[Path | None, typer.Option(help="Your own policy file; its rules come first.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print everything that is known.")] = False,
    platform: Annotated[str | None, typer.Option(help="Say it for a platform: cpu, cuda, rocm.")] = None,
    device: Annotated[str | None, typer.Option(help="Say it for a device: 'NVIDIA H200'.")] = None,
    engine_version: Annotated[str | None, typer.Option(help="Say it for a release.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel size.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a name of the hub.")] = None,
    load_format: Annotated[str | None, typer.Option(help="The engine's --load-format.")] = None,
) -> None:
    """Run the command. Exit status: 0 fuses, 3 refused, 2 bad input."""
    words = words_of(launch)
    asked_about = (platform, device, engine_version, tp)
    target = None
    if words or any(value is not None for value in asked_about):
        # Reading launch commands takes as long to import as the rest of all this.
        from .target import Target, engine_asked, machine_of

        engine = engine_asked(engine, words)
        device_asked = machine_of(platform, device)
        target = Target(engine, words, engine_version, device_asked, tp)
    elif engine is None:
        raise FsePatchError("give --engine, or the command that starts the server: -- vllm serve MODEL")
    now = settings.load() if target is None else target.settings
    revision = revision or (target.text("revision") if target else None)
    load_format = load_format or (target.text("load_format") if target else None) or AUTO
    # Without --policy, the file that serving would use.
    rules = load_policy(policy or now.policy_file)
    source = source_of(checkpoint, revision)
    decisions = in_layout(decide_roles(source, engine, rules, load_format), now.layout)
    main = decisions["main"]
    report = plan_report(main) | {"lm_head": now.lm_head}
    if "draft" in decisions:
        report["draft"] = plan_report(decisions["draft"])
    if target is not None:
        report["runtime"] = target.runtime(decisions, source.read_json(CONFIG_NAME), platform)
    if json:
        print_json(report)
    else:
        _print(checkpoint, report, main, target)
        if verbose:
            print_table(f"{checkpoint} in {engine}", report)
    refused = report["runtime"]["served"] != "fused" if words else isinstance(main, Stock)
    if refused:
        raise typer.Exit(RefusedError.exit_status)


def _print(checkpoint: str, report: dict[str, Any], main: Decision, target: Target | None) -> None:
    if report["lm_head"] != "off":
        say(
            f"The LM head is quantised at load to {report['lm_head']} ({settings.LM_HEAD}), where the "
            "server's start finds it right and faster: its log says so.",
            "yellow",
        )
    if target is not None and (told := target.verdict) is not None:
        say(str(told), COLOURS[told.served])
        if told.served == "fused" and not target.switched_on:
            say("This holds with FSE_PATCH=1 in the server's environment; it is not set here.")
        return
    if isinstance(main, Stock):
        say(f"cannot be fused in {main.engine}: {main.reason.code}: {main.reason.detail}", "red")
        return
    say(f"can be fused in {main.engine}: {main.detail}", "green")
    if report["note"]:
        say(report["note"], "yellow")
    say(f"What a server does with it: fse-patch plan {checkpoint} -- {SERVE[main.engine]} {checkpoint}")


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
