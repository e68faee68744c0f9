"""A server that `fse-patch plan` is asked about, and what it will do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .. import settings
from ..adapters.patching import guards, ledger
from ..errors import FsePatchError
from ..fusion_core.checkpoint.families import Role
from ..fusion_core.decision.native import runtime_report
from ..fusion_core.decision.outcome import Decision
from ..launch import command as launch_command
from ..launch import machine
from ..launch.verdict import Verdict, verdict


class Target:
    """A server that is asked about: its engine, and what is said of it on the command line.

    Args:
        words: its launch command; empty where only its engine is known.
        version: of the engine; the installed one if None.
        device: that of this machine if None.
        tp: tensor-parallel size; as the command says if None.

    Raises:
        FsePatchError: the command, or a variable, cannot be read.
    """

    def __init__(
        self,
        engine: str,
        words: list[str],
        version: str | None,
        device: machine.Device | None,
        tp: int | None,
    ) -> None:
        self.engine, self.words, self.version, self.device = engine, words, version, device
        known = (self.release or "").partition("+")[0]
        asked = launch_command.read(words, known, os.environ, "" if words else engine)
        self.asked = asked if tp is None else replace(asked, values={**asked.values, "tp": tp})
        self.settings = settings.load({**os.environ, **asked.environment})
        self.verdict: Verdict | None = None

    @property
    def release(self) -> str | None:
        """Return the release: as given, or the installed one; None where there is none."""
        if self.version is not None:
            return self.version
        try:
            return guards.engine_version(ledger.load(self.engine))
        except FsePatchError:
            return None

    @property
    def switched_on(self) -> bool:
        """Return whether the command, or this process's environment, switches fse_patch on."""
        return bool(self.asked.switched_on or self.engine in self.settings.engines)

    def text(self, name: str) -> str | None:
        """Return what the launch asks for, where it is a text."""
        value = self.asked[name]
        return value if isinstance(value, str) else None

    def runtime(
        self, decisions: Mapping[Role, Decision], config: Mapping[str, Any], platform: str | None
    ) -> dict[str, Any]:
        """Say what the server does with each role that it builds: the section `runtime` of the report.

        Raises:
            FsePatchError: the release is not known, and a launch command was given.
        """
        release = self.release
        if release is None and self.words:
            raise FsePatchError(f"{self.engine} is not installed here; give --engine-version")
        if release is None:
            section = runtime_report(decisions["main"], platform, None)
            return {**section, **dict.fromkeys(("served", "layout", "modes", "reason", "gain"))}
        device = self.device or machine.here()

        def say(role: Role) -> Verdict:
            installed = self.version is None
            return verdict(decisions[role], self.asked, release, device, config, self.settings, installed)

        self.verdict = say("main")
        section = runtime_report(decisions["main"], device.platform, release) | self.verdict.to_dict()
        if "draft" in decisions and self.asked["speculative"]:
            section["draft"] = say("draft").to_dict()
        return {**section, "switched_on": self.switched_on, "asked": dict(self.asked.values)}


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


def engine_asked(engine: str | None, words: list[str]) -> str:
    """Return the engine of a command, or that of --engine.

    Raises:
        FsePatchError: the command launches none, or another one.
    """
    launched = launch_command.engine_of_command(words) if words else None
    if engine is not None and launched not in (None, engine):
        raise FsePatchError(f"--engine {engine}: the command behind -- launches {launched}")
    if (name := engine or launched) is not None:
        return name
    if words:
        launch_command.read(words, "", {})  # says what is wrong with it
    raise FsePatchError("give --engine, or the command that starts the server: -- vllm serve MODEL")
