"""The start of a quantised LM head, before anything is served: proof, cost, number of tokens, and a line.

Processes share what they found at three points that each reaches, whatever failed in it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch

from .. import runtime
from .. import settings as variables
from ..errors import words
from ..fusion_core.forward.threshold import Threshold, threshold_of
from ..fusion_core.proof.head import (
    MEASURED,
    Cost,
    Part,
    cost_of,
    part_of,
    random_states,
    scale_of,
    spread_of,
    text_states,
)
from ..fusion_core.proof.head_text import TEXT
from ..fusion_core.reasons import Reason
from ..settings import Settings
from .graph_timing import capture, in_turn
from .head import FORMAT, MOST, EngineHead, Head, of_weight
from .paired import PairedEngine

log = logging.getLogger("fse_patch")
Value = TypeVar("Value")
# Tokens, where that number is from, and why there are none.
Limit: TypeAlias = "tuple[int, str, Reason | None]"
TOKENIZER = "tokenizer.json"
SIZES = (1, 2, 4, 8, MOST)
# Where the user wants no measurement, and takes the risk.
UNMEASURED = 4


@dataclass(frozen=True)
class Prepared:
    """What a process found by itself.

    Args:
        spread: as of `spread_of`; rows: of the head by the place of their token in the text.
    """

    reason: Reason | None = None
    spread: tuple[float, int] = (0.0, 0)
    rows: dict[int, torch.Tensor] = field(default_factory=dict)


def start_head(
    own: EngineHead, refusals: Iterable[Reason], engine: PairedEngine, now: Settings, model: str
) -> None:
    """Quantise a head and open it; every process that has rows of it calls this at the same point.

    Args:
        refusals: why it stays as it is, by the engine's arguments and by how the engine has built it.
        model: the folder or name that the engine loads, where a tokenizer may be.
    """
    if of_weight(own.module) is not None:
        return  # of a model that was started before
    begun = time.perf_counter()
    head: Head | None = None
    reason = next(iter(refusals), None)
    if reason is None:
        head = _guarded(lambda: Head(own), None)
        reason = None if head is not None else Reason("head.format", "it could not be copied")
    ids = _token_ids(model)
    mine = Prepared(reason) if head is None else _guarded(lambda: _prepare(head, ids, now), None)
    mine = mine or Prepared(Reason("head.proof", "the comparison ended with an error"))
    all_here: list[Prepared] = engine.gather(mine)
    reason = mine.reason or next((other.reason for other in all_here if other.reason), None)
    if reason is None and head is not None:
        costs = _costs(head, all_here, engine)
        head.told.costs = costs
        reason = next((_too_much(name, cost) for name, cost in costs.items() if not cost.allowed), None)
        reason = reason or (None if costs else Reason("head.proof", "its cost could not be measured"))
    if reason is None and head is not None:
        failed: Limit = (0, "", Reason("slower.unmeasured", "the measurement ended with an error"))
        tokens, source, reason = _guarded(lambda: _limit(head, now), failed)
        others = engine.gather((tokens, reason))
        tokens, why = min(others, key=lambda other: int(other[0]))
        head.told.source, head.limit = source, tokens
        reason = reason or why
    if head is not None:
        head.calls.clear()
        if reason is not None:
            head.drop(reason)
    _tell(head, reason, time.perf_counter() - begun)


def _guarded(run: Callable[[], Value], otherwise: Value) -> Value:
    """Run something that must not keep this process from the point where all meet."""
    try:
        return run()
    except Exception as error:
        log.debug("the LM head stays as it is: %s", words(error), exc_info=True)
        return otherwise


def _too_much(name: str, cost: Cost) -> Reason:
    return Reason("head.inaccurate", f"on {cost.states} states ({name}): {cost}")


def _token_ids(model: str) -> list[int]:
    """Return the tokens of the text; none where there is no tokenizer."""
    path = Path(model) / TOKENIZER
    if not path.is_file():
        return []
    try:
        from tokenizers import Tokenizer

        return list(Tokenizer.from_file(str(path)).encode(TEXT, add_special_tokens=False).ids)[:MEASURED]
    except Exception as error:
        log.debug("the tokenizer cannot be read: %s", words(error))
        return []


@torch.inference_mode()
def _prepare(head: Head, ids: list[int], now: Settings) -> Prepared:
    most = min(now.cpu_threshold, MOST) if now.cpu_threshold else MOST
    if (reason := head.fault(max(most, 1))) is not None:
        return Prepared(reason)
    weight, (count, first) = head.own.weight, head.own.tokens
    states = random_states(MEASURED, weight.shape[1], weight.device)
    here = {i: token - first for i, token in enumerate(ids) if 0 <= token - first < count}
    return Prepared(None, spread_of(states, weight, count), {i: weight[r].cpu() for i, r in here.items()})


@torch.inference_mode()
def _costs(head: Head, found: list[Prepared], engine: PairedEngine) -> dict[str, Cost]:
    """Measure the cost over all processes; nothing where one of them failed."""
    weight, (count, first) = head.own.weight, head.own.tokens
    scale = scale_of([other.spread for other in found])
    kinds = {"random": random_states(MEASURED, weight.shape[1], weight.device)}
    rows = {place: row for other in found for place, row in other.rows.items()}
    if rows:
        kinds["text"] = text_states(torch.stack([rows[i] for i in sorted(rows)]).to(weight.device))

    def measure() -> dict[str, Part]:
        return {
            name: part_of(states * scale, weight, head.held, count, first) for name, states in kinds.items()
        }

    parts = engine.gather(_guarded(measure, None))
    if any(part is None for part in parts):
        return {}
    return {name: cost_of([part[name] for part in parts]) for name in kinds}


def _limit(head: Head, now: Settings) -> Limit:
    """Return up to how many tokens the copy runs, where that is from, and why not at all."""
    if not head.own.weight.is_cuda:
        if now.cpu_threshold:
            return now.cpu_threshold, variables.CPU_THRESHOLD, None
        return 0, "", Reason("slower.unmeasured", "on a CPU the engine's own head is as fast or faster")
    if now.measure == "off":
        if now.allow_unmeasured:
            return UNMEASURED, variables.ALLOW_UNMEASURED, None
        return 0, "", Reason("slower.unmeasured", f"{variables.MEASURE} is off, and heads are not kept")
    found = measure(head)
    if found.tokens:
        return found.tokens, "measured", None
    return (
        0,
        "measured",
        Reason("slower.measured", "the engine's own head was measured to be as fast or faster"),
    )


@torch.inference_mode()
def measure(head: Head) -> Threshold:
    """Time the engine's own head against ours in CUDA graphs; it is larger than the cache of a device."""
    weight, ratios = head.own.weight, {}
    captured = head.captured.copy()
    for size in SIZES:
        states = random_states(size, weight.shape[1], weight.device).to(weight.dtype)
        graphs = {}
        for name, limit in (("stock", 0), ("ours", MOST)):
            head.limit = limit
            graphs[name] = capture(partial(head.own.apply, states))
        seconds = in_turn(graphs)
        ratios[size, FORMAT] = [s / o for s, o in zip(seconds["stock"], seconds["ours"], strict=True)]
    # These graphs are gone.
    head.limit, head.captured = 0, captured
    return threshold_of(ratios, (FORMAT,))


def _tell(head: Head | None, reason: Reason | None, seconds: float) -> None:
    runtime.changed()
    if reason is not None or head is None:
        code, detail = ("", "") if reason is None else (reason.code, reason.detail)
        log.warning("LM head: not quantised: %s: %s; the engine's own serves", code, detail)
        return
    costs = "; ".join(f"{name}: {cost}" for name, cost in head.told.costs.items())
    log.info(
        "LM head: %s up to %d tokens (%s), %.0f MB beside the engine's own; %s; in %.2f s",
        FORMAT,
        head.limit,
        head.told.source,
        head.held.nbytes / 1e6,
        costs,
        seconds,
    )
