"""What `fse-patch verify` asks of a vLLM worker, through vLLM's own worker extension."""

from __future__ import annotations

from typing import Any

from vllm.distributed.parallel_state import get_pp_group

from .. import model_process


class VerifyExtension:
    """Mixed into vLLM's worker by ``worker_extension_cls``; called with ``collective_rpc``."""

    def fse_warm_up(self) -> None:
        """Run a batch without requests where vLLM has not: later stages get their buffers in it.

        In eager mode on a CPU it warms nothing up, and a second pipeline stage ends with its first batch.
        """
        runner = self.model_runner  # type: ignore[attr-defined]
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.profile_run()

    def fse_report(self) -> dict[str, Any]:
        """Return what the roles of this worker really ran."""
        return model_process.report(get_pp_group().rank_in_group)

    def fse_reset(self) -> None:
        """Forget the calls of vLLM's own warm-up."""
        model_process.reset()

    def fse_control(self, factor: float) -> None:
        """Multiply the first shared slot by ``factor``."""
        model_process.control(factor)

    def fse_head(self, state: str) -> None:
        """Let the LM head run as `model_process.head` says."""
        model_process.head(state)

    def fse_jitter(self, seed: int) -> None:
        """Give the embedding the noise of one more rounding."""
        model_process.jitter(self.model_runner.model.modules(), seed)  # type: ignore[attr-defined]
