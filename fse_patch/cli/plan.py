"""`fse-patch plan`: will a checkpoint, or a launch command, be served fused? No engine, no GPU is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import settings
from ..adapters.patching import guards, ledger
from ..errors import FsePatchError, RefusedError
from ..fusion_core.checkpoint.families import Role
from ..fusion_core.checkpoint.sources import CONFIG_NAME
from ..fusion_core.checkpoint.weight_files import AUTO
from ..fusion_core.decision.decide import decide_roles
from ..fusion_core.decision.native import runtime_report
from ..fusion_core.decision.outcome import Decision, Merged, Stock
from ..fusion_core.decision.policy_file import load_policy
from ..fusion_core.decision.proven import proven_platforms
from ..launch import command as launch_command
from ..launch import machine
from ..launch.verdict import Verdict, verdict
from .arguments import engine_option, source_of
from .output import print_json, print_table, say


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
    words = launch or []
    name = _engine(engine, words)
    target = Target(name, words, engine_version, machine_of(platform, device), tp, load_format, revision)
    asked, now = target.asked()
    # Without --policy, the file that serving would use.
    rules = load_policy(policy or now.policy_file)
    source = source_of(checkpoint, revision or _text(asked["revision"]))
    decisions = decide_roles(source, name, rules, load_format or _text(asked["load_format"]) or AUTO)
    report = plan_report(decisions["main"])
    if "draft" in decisions:
        report["draft"] = plan_report(decisions["draft"])
    found: Verdict | None = None
    if target.is_given:
        config = source.read_json(CONFIG_NAME)
        told = target.verdicts(decisions, asked, config, now)
        found = told.get("main")
        report["runtime"] = target.runtime(decisions["main"], asked, told, platform)
    if json:
        print_json(report)
    else:
        _print(checkpoint, report, decisions["main"], found, target, asked, now)
        if verbose:
            print_table(f"{checkpoint} in {name}", report)
    refused = found is not None and found.served != "fused" if words else isinstance(decisions["main"], Stock)
    if refused:
        raise typer.Exit(RefusedError.exit_status)


@dataclass(frozen=True)
class Target:
    """A server that is asked about: its engine, and what is said of it on the command line."""

    engine: str
    words: list[str]
    version: str | None
    device: machine.Device | None
    tp: int | None
    load_format: str | None
    revision: str | None

    @property
    def is_given(self) -> bool:
        """Return whether anything of a server is said, besides its engine."""
        return bool(self.words) or not (self.version is None and self.device is None and self.tp is None)

    @property
    def release(self) -> str | None:
        """Return the release: as given, or the installed one; None where there is none."""
        if self.version is not None:
            return self.version
        try:
            return guards.engine_version(ledger.load(self.engine))
        except FsePatchError:
            return None

    def asked(self) -> tuple[launch_command.Asked, settings.Settings]:
        """Return what the server is asked for, and the settings that it would have.

        Raises:
            FsePatchError: the command, or a variable, cannot be read.
        """
        known = (self.release or "").partition("+")[0]
        engine = "" if self.words else self.engine
        asked = launch_command.read(self.words, known, os.environ, engine)
        if self.tp is not None:
            asked = replace(asked, values={**asked.values, "tp": self.tp})
        return asked, settings.load({**os.environ, **asked.environment})

    def verdicts(
        self,
        decisions: Mapping[Role, Decision],
        asked: launch_command.Asked,
        config: Mapping[str, Any],
        now: settings.Settings,
    ) -> dict[Role, Verdict]:
        """Say what the server does with each role that it builds.

        Raises:
            FsePatchError: the release is not known, and a launch command was given.
        """
        if (release := self.release) is None:
            if self.words:
                raise FsePatchError(f"{self.engine} is not installed here; give --engine-version")
            return {}
        device = self.device or machine.here()
        roles = [role for role in decisions if role == "main" or asked["speculative"]]
        return {role: verdict(decisions[role], asked, release, device, config, now) for role in roles}

    def runtime(
        self,
        decision: Decision,
        asked: launch_command.Asked,
        told: Mapping[Role, Verdict],
        platform: str | None,
    ) -> dict[str, Any]:
        """Return the section `runtime` of the report."""
        known = platform or (told["main"].device.platform if told else None)
        section = runtime_report(decision, known, self.version or (self.release if told else None))
        unknown = dict.fromkeys(("served", "layout", "modes", "reason", "gain"))
        section |= told["main"].to_dict() if told else unknown
        if "draft" in told:
            section["draft"] = told["draft"].to_dict()
        return section | {"asked": dict(asked.values)}


def machine_of(platform: str | None, device: str | None) -> machine.Device | None:
    """Return the device that is asked about; None for that of this machine.

    Raises:
        FsePatchError: the platform is unknown, or is not that of the device.
    """
    found = None if device is None else machine.named(device)
    if platform is None:
        return found
    of_platform = machine.of_platform(platform)
    if found is not None and found.platform != of_platform.platform:
        raise FsePatchError(f"--device {device}: is a device of {found.platform}, not of {platform}")
    return found or of_platform


def _engine(engine: str | None, words: list[str]) -> str:
    launched = launch_command.engine_of_command(words) if words else None
    if engine is not None and launched not in (None, engine):
        raise FsePatchError(f"--engine {engine}: the command behind -- launches {launched}")
    if (name := engine or launched) is not None:
        return name
    if words:
        launch_command.read(words, "", {})  # says what is wrong with it
    raise FsePatchError("give --engine, or the command that starts the server: -- vllm serve MODEL")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _print(
    checkpoint: str,
    report: dict[str, Any],
    main: Decision,
    found: Verdict | None,
    target: Target,
    asked: launch_command.Asked,
    now: settings.Settings,
) -> None:
    if found is not None:
        on = asked.switched_on or target.engine in now.engines
        colour = {"fused": "green", "native": "yellow", "stock": "red"}[found.served]
        say(str(found), colour)  # type: ignore[arg-type]
        if found.served == "fused" and not on:
            say("This holds with FSE_PATCH=1 in the server's environment; it is not set here.")
    elif isinstance(main, Merged):
        say(f"can be fused in {target.engine}: {main.detail}", "green")
    else:
        say(f"cannot be fused in {target.engine}: {main.reason.code}: {main.reason.detail}", "red")
    if found is None and isinstance(main, Merged):
        if report["note"]:
            say(report["note"], "yellow")
        serve = "vllm serve" if target.engine == "vllm" else "python -m sglang.launch_server --model-path"
        say(f"What a server does with it: fse-patch plan {checkpoint} -- {serve} {checkpoint}")


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
