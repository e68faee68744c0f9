"""`fse-patch compare`: was it worth it? Servers stock, fused and stock again, by the engine's own client."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import FAILED, FsePatchError, RefusedError
from ..fusion_core.checkpoint.sources import CONFIG_NAME, read_json
from ..fusion_core.checkpoint.weight_files import AUTO
from ..fusion_core.decision.decide import decide_roles
from ..fusion_core.decision.outcome import in_layout
from ..fusion_core.decision.policy_file import load_policy
from ..lab.compare import client, files, http, servers, table
from ..lab.compare.report import report_of
from ..lab.compare.run import ARMS, FUSED, Job, Opened, measure
from ..lab.compare.steps import Steps
from ..lab.free_port import free_port
from ..launch import machine
from ..patches import ENGINES
from ..version import __version__
from . import status
from .arguments import folder_of, source_of, words_of
from .bench import numbers
from .compare_display import Display
from .ending import NAME
from .output import Colour, print_json, say
from .target import Target, engine_asked
from .verify import engines_end_with_us, vocab_size
from .verify import say as show

NO_PICTURE = "no picture: it needs matplotlib: pip install 'fse-patch[plot]'"
ENDED = "interrupted; nothing that it started is left, and nothing is written"
INTERRUPTED = 130
COLOURS: dict[str, Colour] = {table.FASTER: "green", table.SLOWER: "red"}


def command(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder of a checkpoint, or ORG/NAME that was downloaded.")
    ],
    launch: Annotated[
        list[str] | None,
        typer.Argument(help="Behind --: the command that starts the server, such as vllm serve MODEL."),
    ] = None,
    stock: Annotated[str, typer.Option(help="In place of a command: a server that runs without us.")] = "",
    fused: Annotated[str, typer.Option(help="In place of a command: a server that runs fused.")] = "",
    concurrency: Annotated[str, typer.Option(help="Numbers of streams, with commas.")] = "1,2,4,8,16,32,64",
    rounds: Annotated[int, typer.Option(min=1, help="Requests of each stream.")] = 8,
    input_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 128,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: that of the command, or a free one.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for table, picture and page. Default: a name with the time."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for a server to start, and for one number of streams.")
    ] = 1800,
    api_key: Annotated[str, typer.Option(help="If the servers want one.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run the command. Exit status: 0 compared, 1 answers differ, 2 bad input, 3 not fused, 4 no server."""
    words, streams = words_of(launch), tuple(numbers(concurrency, "concurrency"))
    if bool(words) == bool(stock or fused) or bool(stock) != bool(fused):
        raise FsePatchError(
            "give the command that starts the server, behind --, or --stock and --fused, a URL each"
        )
    folder = folder_of(checkpoint)
    place = out or Path(f"compare-{folder.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}")
    files.check(place)
    load = client.Load(streams, rounds, input_tokens, output_tokens, timeout)
    facts: dict[str, Any] = {"fse_patch": __version__, "date": time.strftime("%Y-%m-%d %H:%M")}
    if words:
        target = read_command(checkpoint, folder, words)
        engine, float32 = target.engine, target.text("dtype") in ("float32", "float")
        bench = client.find(engine)
        refuse_early(target, checkpoint)
        number = int(port or target.asked["port"] or free_port())
        servers.check_port(number)
        opened = partial(_start, engine, words, number, timeout)
        facts |= {"engine": f"{engine} {target.release}", "device": str(machine.here())}
        facts["command"] = shlex.join(words)
    else:
        stock, fused = (status.address(url) for url in (stock, fused))
        engine, float32 = _engine_of(stock, api_key), False
        bench = client.find(engine)
        opened = partial(_given, stock, fused)
        facts |= {"engine": engine, "servers": f"stock {stock}, fused {fused}"}
    vocab = vocab_size(read_json(folder / CONFIG_NAME), folder)
    job = Job(engine, bench, folder, vocab, float32, load, api_key)
    picture = find_spec("matplotlib") is not None
    if not picture:
        print(f"{NAME}: {NO_PICTURE}", file=sys.stderr)
    with told_when_ended():
        report = compared(job, opened, facts)
        made = files.write(place, report, picture)
    if json:
        print_json({**report, "files": list(map(str, made))})
    else:
        _print(report, made)
    if not report["ok"]:
        raise typer.Exit(FAILED)


def read_command(checkpoint: str, folder: Path, words: list[str]) -> Target:
    """Read the launch command.

    Raises:
        FsePatchError: it is of no known engine, has an unknown flag, or serves another model.
    """
    engine = engine_asked(None, words)
    target = Target(engine, words, None, None, None)
    model = target.asked.model
    if model != checkpoint and (not model or Path(model).expanduser().resolve() != folder.resolve()):
        named = f"serves {model!r}" if model else "names no model"
        raise FsePatchError(f"the command behind -- {named}, and CHECKPOINT is {checkpoint!r}")
    return target


def refuse_early(target: Target, checkpoint: str) -> None:
    """Refuse at once what no server would fuse: the stock one, which comes first, may take long.

    Raises:
        RefusedError: the server would not be fused.
    """
    source, now = source_of(checkpoint), target.settings
    rules, load_format = load_policy(now.policy_file), target.text("load_format") or AUTO
    decisions = in_layout(decide_roles(source, target.engine, rules, load_format), now.layout)
    told = target.runtime(decisions, source.read_json(CONFIG_NAME), None)
    if told["served"] != "fused":
        raise RefusedError(told["reason"], told["detail"])


def _engine_of(url: str, key: str) -> str:
    owner = str(http.model_of(url, key).get("owned_by")).lower()
    if owner not in ENGINES:
        raise FsePatchError(f"{url}: is served by {owner}; known are {', '.join(ENGINES)}")
    return owner


def _start(
    engine: str, words: list[str], port: int, limit: float, name: str, folder: Path
) -> AbstractContextManager[servers.Running]:
    patched = name == FUSED
    environment = servers.environment_of(engine, words, patched, os.environ)
    command = servers.launch_words(engine, words, patched, port)
    return servers.started(name, command, environment, port, folder / "server.log", limit)


def _given(stock: str, fused: str, name: str, folder: Path) -> AbstractContextManager[servers.Running]:
    return servers.given(name, fused if name == FUSED else stock)


@contextmanager
def told_when_ended() -> Iterator[None]:
    """Let Python clean up when a signal ends us, and say so in a line."""
    try:
        with engines_end_with_us():
            yield
    except KeyboardInterrupt:
        print(f"{NAME}: {ENDED}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except SystemExit:  # SIGTERM, SIGHUP
        print(f"{NAME}: {ENDED}", file=sys.stderr)
        raise


def compared(job: Job, opened: Opened, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Try the client, measure, and return the report."""

    def ask(url: str) -> list[dict[str, Any]]:
        return [{**rank, "line": status.line(rank)} for rank in status.ask(url, job.key, http.TIMEOUT)]

    with tempfile.TemporaryDirectory(prefix="fse_patch_", ignore_cleanup_errors=True) as work:
        show("trying the engine's bench client")
        client.try_out(job.engine, job.bench, Path(work))
        with Display() as display:
            steps = Steps(ARMS, job.load.streams, display)
            return report_of(job, measure(job, opened, ask, steps, Path(work)), facts)


def _print(report: Mapping[str, Any], made: list[Path]) -> None:
    from rich.console import Console

    kinds = {row["verdict"] for row in report["rows"]}
    say(report["speed"], COLOURS.get(kinds.pop(), "yellow") if len(kinds) == 1 else "yellow")
    say(report["answers_words"], "green" if report["ok"] else "red")
    Console().print(table.rich_table(report["rows"], f"{report['model']}: tokens a second"))
    say("written: " + ", ".join(map(str, made)))
