"""An LM head with a copy in 8 bits for few tokens; above them, the engine's own runs from its own weight.

The copy hangs on the weight. Drafts that share the weight, as a module or as a tensor, run from the same
copy; an embedding that is tied to it stays as it is.
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch

from .. import runtime
from ..errors import FsePatchError
from ..fusion_core.proof.head import (
    CHECKED,
    MEASURED,
    Cost,
    cost_of,
    part_of,
    random_states,
    row_fault,
    scale_of,
    spread_of,
)
from ..fusion_core.quant.int8_groups import GROUP, ROWS, Int8Rows, quantised, renew
from ..fusion_core.reasons import Reason
from .stop import stop_told

log = logging.getLogger("fse_patch")
FORMAT = "int8:g32"
# Most tokens of a call of the kernel.
MOST = 16
# The engines' classes that apply a weight as it is.
PLAIN = ("UnquantizedEmbeddingMethod", "UnquantizedLinearMethod")
# Of a weight: its `Head`.
MARK = "_fse_patch_head"


@dataclass
class Told:
    """What was found at start, and why nothing runs in 8 bits.

    Args:
        source: where the number of tokens is from: "measured", or a setting.
        costs: of quantisation, by the states that it was measured on.
    """

    reason: Reason | None = None
    source: str = ""
    costs: dict[str, Cost] = field(default_factory=dict)


@dataclass
class EngineHead(ABC):
    """One head as an engine has built it, and the engine's way to apply it.

    Args:
        module: has the weight; processor: the engine's logits processor.
    """

    module: Any
    processor: Any

    @property
    def weight(self) -> torch.Tensor:
        """Return its weight [N, K]: in tensor parallelism, the rows of this process."""
        weight: torch.Tensor = self.module.weight
        return weight

    @abstractmethod
    def apply(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits [num_tokens, N] of these rows, through the method that is patched."""

    @property
    def tokens(self) -> tuple[int, int]:
        """Return how many rows stand for tokens, the others pad, and the token of the first."""
        held = self.module.shard_indices
        return int(held.num_org_elements), int(held.org_vocab_start_index)


class Head:
    """A head that serves: the copy in 8 bits, and up to how many tokens it runs."""

    def __init__(self, own: EngineHead) -> None:
        self.own = own
        self.held: Int8Rows = quantised(own.weight)
        self.limit = 0
        self.told = Told()
        self.calls: Counter[str] = Counter()
        self.captured: Counter[str] = Counter()
        setattr(own.weight, MARK, self)
        _watch(own.weight, self)
        HEADS.add(self)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return logits [num_tokens, N], or None where the engine's own head is to run."""
        if torch.compiler.is_compiling():
            return None  # its counters are no part of a graph
        ours = hidden_states.ndim == 2 and 0 < len(hidden_states) <= self.limit
        name = FORMAT if ours else "stock"
        self.calls[name] += 1
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            self.captured[name] += 1
        if not ours:
            return None
        states = hidden_states.to(self.own.weight.dtype)
        if states.is_cuda:
            from ..fusion_core.kernels.head_int8 import head_logits  # needs Triton

            return head_logits(states.contiguous(), self.held.values, self.held.scales)
        rows = range(0, len(self.held.values), ROWS)
        parts = [states.float() @ self.held.rows(first, first + ROWS).T for first in rows]
        return torch.cat(parts, 1).to(states.dtype)

    def drop(self, reason: Reason) -> None:
        """Let the engine's own head serve from now on, and free the copy."""
        self.limit, self.told.reason = 0, reason
        if not self.captured[FORMAT]:
            # Copies: views would hold the memory.
            self.held = Int8Rows(self.held.values[:0].clone(), self.held.scales[:0].clone())

    @torch.inference_mode()
    def fault(self, most: int) -> Reason | None:
        """Compare ours, for up to ``most`` tokens, with the engine's own head in every row."""
        weight = self.own.weight
        states = random_states(CHECKED, weight.shape[1], weight.device).to(weight.dtype)
        # A row may hide behind one state, not behind all of them.
        calls = [states[at : at + most] for at in range(0, CHECKED, most)] + [states[:1], states[:2]]
        before = self.limit, self.calls.copy()
        try:
            for some in calls:
                self.limit = 0
                stock = self.own.apply(some)
                self.limit, ran = len(some), self.calls[FORMAT]
                ours = self.own.apply(some)
                if self.calls[FORMAT] == ran:
                    return Reason("head.format", "the engine applies it by a method that is not known")
                if (found := row_fault(some, ours, stock, self.held.scales)) is not None:
                    return Reason("head.proof", f"{len(some)} tokens, {found}")
        finally:
            self.limit, self.calls = before
        return None

    @stop_told()
    def updated(self) -> None:
        """Quantise again after an update of the weight, and prove it again.

        Raises:
            FsePatchError: it is not right, and captured CUDA graphs would run it.
        """
        if not self.limit:
            return
        renew(self.held, self.own.weight)
        reason = self.fault(min(self.limit, MOST)) or self._cost_here()
        if reason is None:
            return
        if self.captured[FORMAT]:
            raise FsePatchError(f"LM head: {reason.detail}; captured CUDA graphs would serve it")
        log.warning("LM head: %s: after an update: %s; the engine's own serves", reason.code, reason.detail)
        self.drop(Reason(reason.code, f"after an update: {reason.detail}"))
        runtime.changed()

    @torch.inference_mode()
    def _cost_here(self) -> Reason | None:
        """Measure the cost by the rows of this process alone: an update does not wait for the others."""
        weight, (rows, first_id) = self.own.weight, self.own.tokens
        states = random_states(MEASURED, weight.shape[1], weight.device)
        states = states * scale_of([spread_of(states, weight, rows)])
        cost = cost_of([part_of(states, weight, self.held, rows, first_id)])
        return None if cost.allowed else Reason("head.inaccurate", str(cost))

    def report(self) -> dict[str, Any]:
        """Return what it really did, for `verify` and `status`."""
        reason = self.told.reason
        return {
            "format": FORMAT,
            "threshold": self.limit,
            "threshold_from": self.told.source,
            "reason": "" if reason is None else reason.code,
            "detail": "" if reason is None else reason.detail,
            "rows": len(self.own.weight),
            "megabytes": round(self.held.nbytes / 1e6, 1),
            "cost": {name: vars(cost) for name, cost in self.told.costs.items()},
            "calls": dict(self.calls),
            "captured": dict(self.captured),
        }


# All that live in this process.
HEADS: WeakSet[Head] = WeakSet()


def constructed() -> list[Head]:
    """Return the heads of this process."""
    return list(HEADS)


def holder_of(model: Any) -> Any:
    """Return the module of a model that has a head, and what applies it; None where it is elsewhere."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return next((m for m in modules if hasattr(m, "lm_head") and hasattr(m, "logits_processor")), None)


def of_weight(module: Any) -> Head | None:
    """Return the head whose weight a module has; None where it is the engine's alone."""
    return getattr(getattr(module, "weight", None), MARK, None)


def _watch(weight: Any, head: Head) -> None:
    """Quantise again whenever a loader has written the weight."""
    original: Callable[..., Any] = weight.weight_loader

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        head.updated()
        return result

    weight.weight_loader = load


def format_refusals(module: Any) -> Iterator[Reason]:
    """Refuse a head that is not a plain matrix, or of a form that the kernel does not take."""
    weight, method = getattr(module, "weight", None), type(getattr(module, "quant_method", None)).__name__
    if method not in PLAIN or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        yield Reason("head.format", f"the engine applies it by {method}: it is quantised already")
        return
    dtypes = {torch.bfloat16, torch.float16} | (set() if weight.is_cuda else {torch.float32})
    if weight.dtype not in dtypes:
        yield Reason("head.format", f"its dtype is {weight.dtype}; 16 bits are quantised")
    if weight.shape[1] % GROUP or not weight.is_contiguous():
        yield Reason("head.format", f"its shape is {tuple(weight.shape)}; groups are of {GROUP} columns")
    if getattr(module, "bias", None) is not None:
        yield Reason("head.format", "it has a bias")
    if not hasattr(weight, "weight_loader"):
        yield Reason("head.format", "its weight has no loader: an update of it would not be seen")
