"""Prometheus metrics of this process, where prometheus_client is installed: an extra, `fse-patch[metrics]`.

Plain metrics of the default registry: whatever exports that, also over processes by PROMETHEUS_MULTIPROC_DIR,
exports these. No name has an engine's name in it: vLLM unregisters what it takes for its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from . import runtime
from .fusion_core.checkpoint.families import family_of
from .version import __version__

log = logging.getLogger("fse_patch")
_lock = threading.Lock()
_published: list[dict[str, Any]] = []


class Metrics:
    """The metrics, in a registry; None is the default one."""

    def __init__(self, registry: Any = None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge

        registry = REGISTRY if registry is None else registry
        self.info = Gauge(
            "fse_patch_info",
            "Version of fse_patch and of the engine that it patches.",
            ["version", "engine", "engine_version"],
            registry=registry,
            multiprocess_mode="max",
        )
        self.decisions = Counter(
            "fse_patch_decisions",
            "Decisions to fuse the shared experts of a model, or not to, and why.",
            ["engine", "family", "fused", "reason", "layout"],
            registry=registry,
        )
        self.slots = Gauge(
            "fse_patch_slots_loaded",
            "Shared-expert slots of which every part was loaded, in one process.",
            ["engine", "role"],
            registry=registry,
            multiprocess_mode="max",
        )

        self.threshold = Gauge(
            "fse_patch_paired_threshold",
            "Most tokens for which layers run paired in one process; 0 where the engine runs all.",
            ["engine", "role"],
            registry=registry,
            multiprocess_mode="min",
        )

    def update(self, status: Mapping[str, Any]) -> None:
        """Bring the metrics up to date with `fse_patch.status`; each decision counts once."""
        for engine, report in status.items():
            self.info.labels(__version__, engine, report["engine_version"]).set(1)
            for role in report["roles"]:
                self.slots.labels(engine, role["role"]).set(role["slots_loaded"])
                if "paired" in role:
                    self.threshold.labels(engine, role["role"]).set(role["paired"]["threshold"])
        for decision in runtime.decisions():
            if decision not in _published:
                _published.append(decision)
                family = family_of(decision["model_type"])
                self.decisions.labels(
                    decision["engine"],
                    "unknown" if family is None else family.name,
                    str(decision["fuse"]).lower(),
                    decision["reason"],
                    decision["weight_layout"],
                ).inc()


_metrics: Metrics | None = None


def publish(status: Callable[[], Mapping[str, Any]]) -> bool:
    """Bring the metrics of the default registry up to date; False where that cannot be done."""
    global _metrics
    with _lock:
        try:
            _metrics = _metrics or Metrics()
            _metrics.update(status())
        except ImportError:
            return False
        except Exception as error:  # a registry that is not as expected must not end a server
            log.warning("no metrics: %s: %s", type(error).__name__, error)
            return False
    return True
