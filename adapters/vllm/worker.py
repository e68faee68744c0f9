"""What `fse-patch verify` asks of a vLLM worker, through vLLM's own worker extension."""

from __future__ import annotations

from typing import Any

from .. import verifying


class VerifyExtension:
    """Mixed into vLLM's worker by ``worker_extension_cls``; called with ``collective_rpc``."""

    def fse_report(self) -> dict[str, Any]:
        """See `verifying.report`."""
        return verifying.report()

    def fse_reset(self) -> None:
        """See `verifying.reset`."""
        verifying.reset()

    def fse_control(self, factor: float) -> None:
        """See `verifying.control`."""
        verifying.control(factor)

    def fse_jitter(self, seed: int) -> None:
        """See `verifying.jitter`."""
        verifying.jitter(self.model_runner.model.modules(), seed)  # type: ignore[attr-defined]
