"""What `fse-patch verify` asks of a vLLM worker, through vLLM's own worker extension."""

from __future__ import annotations

import os
from typing import Any

from .fusion import CONSTRUCTED


class VerifyExtension:
    """Mixed into vLLM's worker by ``worker_extension_cls``; called with ``collective_rpc``."""

    def fse_report(self) -> dict[str, Any]:
        """The process and what each role really ran in it."""
        return {"pid": os.getpid(), "roles": [fusion.report() for fusion in CONSTRUCTED]}

    def fse_reset(self) -> None:
        """Forget the calls of the engine's own warm-up."""
        for fusion in CONSTRUCTED:
            fusion.counter.reset()

    def fse_control(self, factor: float) -> None:
        """Multiply the weight of the first shared slot of the main model by ``factor``."""
        for fusion in CONSTRUCTED:
            if fusion.decision.role == "main":
                for router in fusion.routers.values():
                    router.control_factor = factor
