"""Reads a launch command as the engine would: which engine, which model, and what it asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FsePatchError
from ..fusion_core.data_file import parse
from ..fusion_core.engines import Ask, Launch, facts_of
from ..patches import ENGINES
from ..settings import ENABLE, engines_in
from .flags import flags_of, parser_of, unknown_flag

Value = bool | int | str | None
# The name of our entry points.
PLUGIN = "fse_patch"
_TRUE = {"1", "true", "yes", "on"}


@dataclass(frozen=True)
class Asked:
    """What a launch asks for, in words that both engines share.

    Args:
        model: folder or name, as given; "" where the command names none.
        switched_on: whether FSE_PATCH, or the launcher, asks for this package's work; None where the command
            does not say.
        unseen: why the engine would not load our plugin, in words; "" where it does.
        values: by the names of `Launch.asks`: tp, pp, dp, ep, dtype, quantization, load_format, lora, ...
        environment: variables that the command itself sets.
    """

    engine: str
    model: str
    switched_on: bool | None
    unseen: str
    values: Mapping[str, Value]
    environment: Mapping[str, str]

    def __getitem__(self, name: str) -> Value:
        return self.values.get(name)

    def number(self, name: str) -> int:
        """Return a size, 1 where nothing is asked."""
        value = self.values.get(name)
        return value if isinstance(value, int) else 1

    @property
    def expert_ranks(self) -> int:
        """Return over how many processes whole experts are spread; 1: they are not.

        It is asked for by their number, or by a switch for all processes of tensor parallelism.
        """
        ep = self["ep"]
        if isinstance(ep, bool):
            return self.number("tp") if ep else 1
        return self.number("ep")


@dataclass(frozen=True)
class Parts:
    """A launch command in parts: variables in front, what starts the server, and the server's arguments.

    Args:
        start: the program and all before it, such as ``nice -n 5 python``; without the command's own words.
        command: as `Launch.commands` has it.
    """

    environment: Mapping[str, str]
    start: tuple[str, ...]
    command: str
    arguments: tuple[str, ...]


def parts_of(engine: str, words: Sequence[str]) -> Parts:
    """Take a launch command apart.

    Raises:
        FsePatchError: it launches no server of the engine.
    """
    own, rest = _environment(words)
    found = _own_arguments(engine, rest)
    if found is None:
        raise FsePatchError(f"{' '.join(rest[:3]) or 'nothing'}: no launch command of {engine}")
    command, arguments = found
    start = rest[: len(rest) - len(arguments) - len(command.split())]
    if not command.startswith("-"):  # a program of its own: the path of it counts
        start = [*start, rest[len(start)]]
    return Parts(own, tuple(start), command, tuple(arguments))


def engine_of_command(words: Sequence[str]) -> str | None:
    """Return the engine that a command launches, or None."""
    return next((engine for engine in ENGINES if _own_arguments(engine, words) is not None), None)


def read(words: Sequence[str], release: str, environment: Mapping[str, str], engine: str = "") -> Asked:
    """Read a launch command.

    Args:
        words: as a shell would pass them, with NAME=VALUE in front if any.
        release: of the engine.
        environment: variables that hold where the command does not set them.
        engine: take the words as flags of its server.

    Raises:
        FsePatchError: it launches no engine, or has a flag that the engine has not.
    """
    own, rest = _environment(words)
    found = engine or engine_of_command(rest)
    if found is None:
        shown = " ".join(rest[:3]) or "nothing"
        known = "; ".join(command for name in ENGINES for command in _launch(name).commands)
        raise FsePatchError(f"{shown}: no launch command that is known; known are {known}")
    launch = _launch(found)
    command, arguments = _own_arguments(found, rest) or ("", list(rest))
    given = _parsed(found, launch, arguments, release)
    held = {**environment, **own}
    values = {name: _value(name, ask, given, held) for name, ask in launch.asks.items()}
    model = next((str(given[name]) for name in launch.model if given.get(name)), "")
    on: bool | None = None
    unseen = "" if command in launch.switched_on_by else _unseen(found, held)
    if ENABLE in own:
        on = found in engines_in(own[ENABLE])
    elif command in launch.switched_on_by:
        on = True
    return Asked(found, model, on, unseen, values, own)


def _unseen(engine: str, environment: Mapping[str, str]) -> str:
    """Say why plugins of ours are not loaded: a variable that allows others only."""
    variable = facts_of(engine).plugins.variable
    allowed = environment.get(variable)
    if allowed is None or PLUGIN in [name.strip() for name in allowed.split(",")]:
        return ""
    return f"{variable} is {allowed!r}: {engine} does not load fse_patch; add {PLUGIN} to it"


def _launch(engine: str) -> Launch:
    launch = facts_of(engine).launch
    if launch is None:
        raise FsePatchError(f"{engine}: its command line is not read")
    return launch


def _environment(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Take NAME=VALUE words off the front, and `env` before them."""
    own: dict[str, str] = {}
    rest = list(words)
    while rest and (
        rest[0] in ("env", "exec") or ("=" in rest[0] and rest[0].partition("=")[0].isidentifier())
    ):
        name, is_set, value = rest.pop(0).partition("=")
        if is_set:
            own[name] = value
    return own, rest


def _own_arguments(engine: str, words: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the command that was found, and the arguments of the server behind it."""
    for command in _launch(engine).commands:
        wanted = command.split()
        for start in range(len(words) - len(wanted) + 1):
            found = [Path(words[start]).name, *words[start + 1 : start + len(wanted)]]
            if found == wanted:
                return command, list(words[start + len(wanted) :])
    return None


def _parsed(engine: str, launch: Launch, arguments: list[str], release: str) -> dict[str, Any]:
    objects: dict[str, Any] = {}
    names = {name: flag.to for flag in flags_of(engine).flags for name in flag.names}
    words = _words(launch, names, arguments, objects)
    parser = parser_of(engine, release)
    known, unknown = parser.parse_known_args(words)
    if unknown:
        raise unknown_flag(engine, release, unknown[0])
    given = vars(known)
    if file := given.get("config"):
        # What the command line says goes before the file.
        given = {**_of_file(engine, launch, Path(str(file)), release), **given}
    for name, value in objects.items():
        given[name] = {**_object(name, given.get(name)), **value}
    return given


def _words(
    launch: Launch, names: Mapping[str, str], arguments: list[str], objects: dict[str, Any]
) -> list[str]:
    """Return the arguments in the form that the parser takes; --flag.key VALUE goes into ``objects``.

    Args:
        names: of flags -> where the parser puts their values.
    """
    words: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        short = next((s for s in launch.joined if word.startswith(s) and not word.startswith("--")), None)
        if short is not None:
            value = word.removeprefix(short).removeprefix("=")
            words += [launch.joined[short], *([value] if value else [])]
            continue
        name, has_value, value = word.partition("=")
        head, dotted, key = name.partition(".")
        if head.startswith("--") and launch.underscores:
            head = "--" + head[2:].replace("_", "-")
        if dotted and launch.dotted and head in names:
            value = value if has_value else (left.pop(0) if left else "")
            # One level is all that is asked for here; deeper keys are kept under their own name.
            objects.setdefault(names[head], {})[key.rstrip("+")] = value
            continue
        words.append((f"{head}={value}" if has_value else head) if head.startswith("--") else word)
    return words


def _of_file(engine: str, launch: Launch, path: Path, release: str) -> dict[str, Any]:
    data = parse(path)
    if not isinstance(data, dict):
        raise FsePatchError(f"--config {path}: holds no object")
    arguments: list[str] = []
    objects: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("_", "-")
        if isinstance(value, dict):
            objects[name.replace("-", "_")] = value
        elif value is True:
            arguments.append(f"--{name}")
        elif isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            arguments.append(f"--{name}={value}")
    return {**_parsed(engine, launch, arguments, release), **objects}


def _object(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    try:
        read = json.loads(value)
    except (TypeError, ValueError):
        raise FsePatchError(f"--{name.replace('_', '-')}: not JSON: {value}") from None
    if not isinstance(read, dict):
        raise FsePatchError(f"--{name.replace('_', '-')}: no JSON object: {value}")
    return read


def _value(name: str, ask: Ask, given: Mapping[str, Any], environment: Mapping[str, str]) -> Value:
    value = given.get(ask.flag) if ask.flag else None
    if ask.key and value is not None:
        held = _object(ask.flag, value)
        return next((str(held[key]) for key in ask.key if held.get(key) is not None), None)
    if value is None and ask.variable:
        value = environment.get(ask.variable)
    if value is None:
        return ask.default
    if isinstance(value, list):
        value = ",".join(map(str, value))
    if isinstance(ask.default, bool):
        return value if isinstance(value, bool) else str(value).strip().lower() in _TRUE
    if isinstance(ask.default, int):
        flag = f"--{ask.flag.replace('_', '-')}"
        try:
            size = int(value)
        except ValueError:
            raise FsePatchError(f"{flag} {value!r}: not a whole number") from None
        if size < ask.default == 1:  # a number of processes
            raise FsePatchError(f"{flag} {size}: give 1 or more")
        return size
    return json.dumps(value) if isinstance(value, dict) else str(value)
