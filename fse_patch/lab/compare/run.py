"""Runs a comparison: stock, fused and stock again, one server at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import FsePatchError, RefusedError
from ...fusion_core.engines import Bench
from .. import verify
from . import answers, client, http
from .servers import Running
from .steps import ANSWERS, START, Steps, phase_of

# The second stock says how far a figure may be trusted.
ARMS = ("stock", "fused", "stock again")
FUSED = ARMS[1]
Opened = Callable[[str, Path], AbstractContextManager[Running]]
# What a server says of itself: a row for each process, as of `fse-patch status`, with its ``line``.
Status = Callable[[str], Sequence[Mapping[str, Any]]]
# How a process of ours says in its log that it is fused, merged or paired.
SAID_IN_LOG = ("model: shared expert fused", "model: shared expert paired")


@dataclass(frozen=True)
class Job:
    """What to compare.

    Args:
        engine: its name; bench: its client.
        checkpoint: folder; prompts are made by its tokenizer.
        vocab: number of token ids.
        float32: the servers compute in float32; otherwise in 16 bit.
        key: that the servers want, or "".
    """

    engine: str
    bench: Bench
    checkpoint: Path
    vocab: int
    float32: bool
    load: client.Load
    key: str = ""


@dataclass
class Arm:
    """What one server was, said and did.

    Args:
        fused: None where it does not say.
        said: in words, a line for each of its processes.
    """

    name: str
    fused: bool | None
    said: list[str]
    start_seconds: float | None
    answers: answers.Answers
    levels: dict[int, client.Level] = field(default_factory=dict)


def measure(job: Job, opened: Opened, status: Status, steps: Steps, work: Path) -> list[Arm]:
    """Take all arms.

    Args:
        opened: makes a server of an arm, whose files go into a folder.
        status: asks a server what it is; raises FsePatchError where it does not say.
        work: folder for what no one needs afterwards.

    Raises:
        EngineError: a server did not start, or ended.
        RefusedError: the fused server is not fused.
        FsePatchError: bad input, or the client failed.
    """
    arms = []
    for name in ARMS:
        folder = work / name.replace(" ", "_")
        folder.mkdir()
        with ExitStack() as stack:
            with steps.step(name, START):
                server = stack.enter_context(opened(name, folder))
            arms.append(_arm(job, name, server, status, steps, folder))
    return arms


def _arm(job: Job, name: str, server: Running, status: Status, steps: Steps, folder: Path) -> Arm:
    fused, said = state_of(name, server, status)
    told = http.model_of(server.url, job.key)
    model, longest = str(told["id"]), told.get("max_model_len")
    if isinstance(longest, int) and job.load.input + job.load.output > longest:
        asked = f"{job.load.input} + {job.load.output}"
        fewer = "give fewer --input-tokens or --output-tokens"
        raise FsePatchError(f"the server takes {longest} tokens, not {asked}; {fewer}")
    room = longest if isinstance(longest, int) else max(verify.PROMPT_LENGTHS) + 1
    prompts = [prompt for prompt in verify.prompts(job.vocab) if len(prompt) < room]
    with steps.step(name, ANSWERS):
        taken = answers.take(server.url, model, prompts, job.key, server.check)
    arm = Arm(name, fused, said, server.start_seconds, taken)
    for streams in job.load.streams:
        with steps.step(name, phase_of(streams)):
            how = (server, job.checkpoint, model, job.load, streams, folder, job.key)
            arm.levels[streams] = client.run(job.engine, job.bench, *how)
    return arm


def state_of(name: str, server: Running, status: Status) -> tuple[bool | None, list[str]]:
    """Return whether a server is fused, and what it says of that.

    Raises:
        RefusedError: it should be fused, and is not.
        FsePatchError: it should be stock, and is not.
    """
    try:
        ranks = [rank for rank in status(server.url) if rank["role"] in ("main", None)]
    except FsePatchError:
        # A server that we did not start may be silent; of ours there is the log.
        server.check()
        ours = [line for line in server.log().splitlines() if any(told in line for told in SAID_IN_LOG)]
        is_ours = server.start_seconds is not None
        fused = True if ours else False if is_ours else None
        said = ours or ["started without fse_patch" if is_ours else "it does not say"]
        first: Mapping[str, Any] = {}
    else:
        fused = bool(ranks) and all(rank["fused"] for rank in ranks)
        said = [str(rank["line"]) for rank in ranks]
        first = next((rank for rank in ranks if not rank["fused"]), {})
    if name == FUSED and fused is False:
        detail = first.get("detail") or "its log has no line that says so"
        raise RefusedError(first.get("reason") or "disabled", f"the fused server is stock: {detail}")
    if name != FUSED and fused:
        raise FsePatchError(f"the {name} server is fused: {said[0]}; start it without FSE_PATCH")
    return fused, said


def agreement(job: Job, arms: Sequence[Arm]) -> answers.Agreement:
    """Compare the answers of all arms."""
    stock, fused, again = (arm.answers for arm in arms)
    return answers.agreement(stock, fused, again, job.float32)
