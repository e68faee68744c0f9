"""What the arms of an end-to-end measurement share: questions and answers, prompts, times."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

PROMPT = 64  # ids of a prompt
Request = dict[str, Any]


class Engine(ABC):
    """A live engine of an arm.

    Args:
        request: name, checkpoint, engine_args, streams (most of each kind that will be asked for),
            total_tokens (of all streams at their longest), sets.
    """

    @abstractmethod
    def __init__(self, request: Request) -> None: ...

    @abstractmethod
    def ready(self) -> dict[str, Any]:
        """Return `model_process.report` of the process with the model, its device, versions and sets."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], tokens: int) -> Sequence[int]:
        """Return the last tokens of greedy answers of ``tokens`` tokens to all prompts at once."""

    @abstractmethod
    def reached(self) -> Mapping[int, float]:
        """Return when the first stream of the last call had so many tokens, where known, in seconds.

        Numbers of tokens ascend, at even distances. Up to the end of the first stream all of them run; those
        that began after it go on when it has ended, and their steps are shorter then.
        """

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """Return `model_process.report` by now."""

    @abstractmethod
    def close(self) -> None:
        """End it."""


def prompts(streams: int, vocab: int) -> list[list[int]]:
    """Return prompts of token ids, [streams][PROMPT]: all different, and the same in every arm."""
    return [[(i * 131 + j * 17) % (vocab - 10) + 10 for j in range(PROMPT)] for i in range(streams)]


def versions(engine: Any) -> dict[str, str]:
    """Return the versions that a figure depends on; ``engine`` is its package."""
    import torch

    from ..version import __version__

    return {"fse_patch": __version__, engine.__name__: engine.__version__, "torch": str(torch.__version__)}


def device() -> str:
    """Return the device's name."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def decode(engine: Engine, vocab: int, streams: int, tokens: int, tail: int) -> dict[str, Any]:
    """Return seconds of a call and of its last ``tail`` steps, `held_up`, and how many streams differ.

    Streams that have come to the same tokens choose the same experts. ``tail`` is None where the engine did
    not tell when they began.
    """
    asked = prompts(streams, vocab)
    start = time.perf_counter()
    last = engine.generate(asked, tokens)
    seconds = time.perf_counter() - start
    reached = engine.reached()
    known = tail and {tokens, tokens - tail} <= reached.keys()
    return {
        "seconds": seconds,
        "tail": reached[tokens] - reached[tokens - tail] if known else None,
        "held_up": held_up(list(reached.values())),
        "different_tokens": len(set(last)),
    }


def held_up(ended: Sequence[float]) -> float | None:
    """Return by how many seconds steps of twice the median and more were longer; None for no steps.

    Args:
        ended: when each step ended, or each so many of them.
    """
    taken = [after - before for before, after in pairwise(ended)]
    if not taken:
        return None
    usual = statistics.median(taken)
    return sum(step - usual for step in taken if step >= 2 * usual)


def serve(request: Path, open_engine: Callable[[Request], Engine]) -> None:
    """Open the engine, and answer the parent until it says ``end`` or is gone.

    Args:
        request: `Engine`'s and ``address``, ``authkey`` (hexadecimal) and ``vocab`` (number of token ids).
    """
    asked = json.loads(request.read_text())
    with Client(asked["address"], "AF_UNIX", authkey=bytes.fromhex(asked["authkey"])) as parent:
        parent.send(asked["name"])
        engine = None
        try:
            start = time.perf_counter()
            engine = open_engine(asked)
            parent.send({"start_seconds": time.perf_counter() - start, **engine.ready()})
            _answer(parent, engine, asked["vocab"])
        except EOFError:
            return  # the parent is gone
        except Exception as error:
            traceback.print_exc()
            parent.send({"error": f"{type(error).__name__}: {error}"})
        finally:
            if engine is not None:
                engine.close()


def _answer(parent: Connection, engine: Engine, vocab: int) -> None:
    while (question := parent.recv())["do"] != "end":
        if question["do"] == "decode":
            parent.send(decode(engine, vocab, question["streams"], question["tokens"], question["tail"]))
        else:
            parent.send(engine.report())
