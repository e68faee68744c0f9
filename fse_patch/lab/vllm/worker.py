"""What `fse-patch verify` asks of a vLLM worker, through vLLM's own worker extension."""

from __future__ import annotations

from typing import Any

from .. import model_process


class VerifyExtension:
    """Mixed into vLLM's worker by ``worker_extension_cls``; called with ``collective_rpc``."""

    def fse_report(self) -> dict[str, Any]:
        """See `model_process.report`."""
        return model_process.report()

    def fse_reset(self) -> None:
        """See `model_process.reset`."""
        model_process.reset()

    def fse_control(self, factor: float) -> None:
        """See `model_process.control`."""
        model_process.control(factor)

    def fse_jitter(self, seed: int) -> None:
        """See `model_process.jitter`."""
        model_process.jitter(self.model_runner.model.modules(), seed)  # type: ignore[attr-defined]
