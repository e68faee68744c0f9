"""What adapters tell `fse_patch.status()` about this process: decisions and counters."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

_lock = threading.Lock()
_decisions: list[dict[str, Any]] = []
_counters: dict[str, int] = {}
_listeners: list[Callable[[], object]] = []
# When the first decision was made here, in seconds since 1970.
_since: float | None = None


_status: Callable[[], Mapping[str, Any]] = dict


def answer_with(status: Callable[[], Mapping[str, Any]]) -> None:
    """Let `answer` say what ``status`` returns: what is patched, by engine."""
    global _status
    _status = status


def answer(engine: str) -> dict[str, Any]:
    """Return what this process says of an engine when somebody asks it from outside, ready for JSON."""
    told: dict[str, Any] = json.loads(json.dumps(_status().get(engine, {}), default=str))
    return told


def on_change(listener: Callable[[], object]) -> None:
    """Call ``listener`` whenever a decision or a model has changed; twice is once."""
    if listener not in _listeners:
        _listeners.append(listener)


def changed() -> None:
    """Tell the listeners that there is something new to report."""
    for listener in list(_listeners):
        listener()


def record_decision(decision: Mapping[str, Any]) -> None:
    """Record a decision, ready for JSON; its key ``engine`` says whose it is. Twice is once."""
    global _since
    with _lock:
        _since = _since or time.time()
        if (entry := copy.deepcopy(dict(decision))) not in _decisions:
            _decisions.append(entry)


def decisions() -> list[dict[str, Any]]:
    """Return the recorded decisions, in order."""
    with _lock:
        return copy.deepcopy(_decisions)


def since() -> float | None:
    """Return when the first decision of this process was made, in seconds since 1970; None before it."""
    return _since


def count(name: str, by: int = 1) -> None:
    """Add to a counter, such as "calls.fused"."""
    with _lock:
        _counters[name] = _counters.get(name, 0) + by


def counters() -> dict[str, int]:
    """Return the counters of this process."""
    with _lock:
        return dict(_counters)


def clear() -> None:
    """Forget all."""
    global _since
    with _lock:
        _since = None
        _decisions.clear()
        _counters.clear()
