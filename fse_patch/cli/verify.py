"""`fse-patch verify`: the real engine, stock and fused, teacher-forced on the same tokens."""

from __future__ import annotations

import json as json_module
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..adapters.patching import guards, ledger, standing
from ..errors import EngineError, FsePatchError, RefusedError
from ..fusion_core.checkpoint.families import Role, family_of
from ..fusion_core.checkpoint.sources import CONFIG_NAME, read_json
from ..fusion_core.decision.decide import decide_roles
from ..fusion_core.decision.outcome import Decision, Merged, Paired, Stock, in_layout
from ..fusion_core.decision.policy_file import load_policy
from ..fusion_core.engines import facts_of
from ..lab.verify import VerifyJob
from ..lab.verify import verify as run_verify
from ..launch.flags import check_arguments
from ..settings import LAYOUT, LM_HEAD
from ..settings import load as load_settings
from .arguments import dtype_of, engine_option, folder_of
from .output import print_json, print_table, ranges
from .output import say as tell
from .target import Target

MIN_VOCAB = 64


def command(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder of a checkpoint, or ORG/NAME that was downloaded.")
    ],
    engine: Annotated[str, engine_option()],
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")
    ] = "auto",
    engine_args: Annotated[
        str, typer.Option(help="More engine arguments of both runs, as a JSON object.")
    ] = "{}",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for each of the two runs.")] = 1800,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print everything that is known.")] = False,
) -> None:
    """Run the command. Exit status: 0 within tolerance, 1 not, 3 refused, 2 bad input, 4 no start."""
    arguments = parse_engine_args(engine_args)
    if dtype != "auto":
        dtype_of(dtype)
    folder = folder_of(checkpoint)
    layout = layout_here(folder, engine)
    decisions, _, version = decided(folder, engine, layout)
    check_arguments(engine, version, arguments)
    # A draft is built only where the engine is told to speculate.
    drafts = facts_of(engine).lab.draft_argument in arguments
    roles = tuple(d for role, d in decisions.items() if role == "main" or drafts)
    config = read_json(folder / CONFIG_NAME)
    job = VerifyJob(
        folder,
        tuple(d for d in roles if not isinstance(d, Stock)),
        vocab_size(config, folder),
        checkpoint_dtype(config) if dtype == "auto" else dtype,
        arguments,
        lm_head=LM_HEAD in load_settings().switches,
    )
    with engines_end_with_us():
        (report,) = run_verify(
            [job], engine, version, env={**os.environ, LAYOUT: layout}, timeout=timeout, progress=say
        )
    log = report.pop("log", "")
    if log:
        print(log, file=sys.stderr)
    if json:
        print_json(report)
    else:
        for line in sentences(report):
            tell(line, "green" if report["passed"] else "red")
        if verbose:
            print_table(f"{checkpoint} in {engine} {version}", report)
    for refused in report.get("refused", ()):
        raise RefusedError(refused["reason"], refused["detail"])
    if report.get("ended") == "stock":
        raise EngineError("nothing was compared: " + "; ".join(report["failures"]))
    if not report["passed"]:
        raise typer.Exit(1)


def sentences(report: Mapping[str, Any]) -> list[str]:
    """Return what a report comes to; nothing where the command ends with an error, which says it."""
    if report.get("refused") or report.get("ended") == "stock":
        return []
    if not report["passed"]:
        return [f"not passed: {failure}" for failure in report["failures"]]
    found = (
        f"passed: fused differs from stock by {report['mean_abs_logprob_diff']:.2g} (mean over "
        f"{report['tokens']} tokens, limit {report['tolerance']['mean']:.2g}); the planted fault was seen: "
        f"{report['control_diff']:.2g}"
    )
    layers = ranges(report["fused_layers"])
    ran = f"fused in the engine: layers {layers}; slots loaded: {report['slots_loaded']}"
    head = report.get("lm_head")
    more = [] if not head else [f"LM head: {head['format']} up to {head['threshold']} tokens"]
    if replaced := report.get("replaced_operations"):
        more.append(f"not covered: kernels in whose place stand-ins ran: {', '.join(replaced)}")
    return [found, ran, *more]


def layout_here(checkpoint: Path, engine: str) -> str:
    """Return the layout that is asked for; under "auto" what a server takes on this machine.

    The engine is told it by name: by itself it would not pair without CUDA graphs.
    """
    settings = load_settings()
    if settings.layout != "auto":
        return settings.layout
    decisions = decide_roles(checkpoint, engine, load_policy(settings.policy_file))
    server, config = Target(engine, [], None, None, None), read_json(checkpoint / CONFIG_NAME)
    return server.runtime(decisions, config, None)["layout"] or "merged"


def decided(
    checkpoint: Path, engine: str, layout: str = "merged"
) -> tuple[dict[Role, Decision], Merged | Paired, str]:
    """Decide for each role of a checkpoint whose main model fuses.

    Args:
        layout: as of `in_layout`.

    Returns:
        The decisions, that of the main model, and the installed engine's version.

    Raises:
        RefusedError: it does not fuse, or its patches are not for the installed release.
        FsePatchError: the checkpoint cannot be read, or the engine is not installed.
    """
    settings = load_settings()
    decisions = in_layout(decide_roles(checkpoint, engine, load_policy(settings.policy_file)), layout)
    book = ledger.load(engine)
    version = guards.engine_version(book)
    main = decisions["main"]
    if isinstance(main, Stock):
        raise RefusedError(main.reason.code, main.reason.detail)
    family = family_of(main.model_type)
    assert family is not None, "it would not fuse"
    if problem := standing.standing_of(book, version, settings.switches).problem_of(family.name):
        raise problem
    return decisions, main, version


@contextmanager
def engines_end_with_us() -> Iterator[None]:
    """Let Python clean up when a signal ends it: engines would be left behind on their device.

    SIGHUP is what a terminal sends that is closed; under nohup it stays ignored.
    """
    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                before = signal.signal(number, lambda number, frame: sys.exit(128 + number))
                stack.callback(signal.signal, number, before or signal.SIG_DFL)
        yield


def say(line: str) -> None:
    """Tell of progress on stderr: stdout is the report's."""
    print(f"fse-patch: {line} ...", file=sys.stderr, flush=True)


def parse_engine_args(text: str) -> dict[str, Any]:
    """Return the JSON object given with --engine-args.

    Raises:
        FsePatchError: it is not one.
    """
    try:
        value = json_module.loads(text)
    except ValueError as error:
        raise FsePatchError(f"--engine-args: not JSON ({error}); give an object such as '{{}}'") from error
    if not isinstance(value, dict):
        raise FsePatchError("--engine-args: give a JSON object such as '{\"tensor_parallel_size\": 2}'")
    return value


def _text(config: dict[str, Any]) -> dict[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def vocab_size(config: dict[str, Any], checkpoint: Path) -> int:
    """Return the number of token ids that prompts are drawn from.

    Raises:
        FsePatchError: config.json names none, or too few.
    """
    size = _text(config).get("vocab_size")
    if type(size) is not int or size < MIN_VOCAB:
        raise FsePatchError(
            f"{checkpoint / 'config.json'}: 'vocab_size' is {size!r}; expected at least {MIN_VOCAB}"
        )
    return size


def checkpoint_dtype(config: dict[str, Any]) -> str:
    """Return what the engines run by default: the checkpoint's dtype, and 16 bit for float32."""
    text = _text(config)
    named = next((c[k] for c in (text, config) for k in ("dtype", "torch_dtype") if c.get(k)), "bfloat16")
    return str(named).removeprefix("torch.")
