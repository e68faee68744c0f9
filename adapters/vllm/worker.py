"""What `fse-patch verify` asks of a vLLM worker, through vLLM's own worker extension."""

from __future__ import annotations

import os
from typing import Any

import torch

from ... import runtime
from .fusion import constructed


class VerifyExtension:
    """Mixed into vLLM's worker by ``worker_extension_cls``; called with ``collective_rpc``."""

    def fse_report(self) -> dict[str, Any]:
        """The process and what each role really ran in it."""
        return {
            "pid": os.getpid(),
            "roles": [fusion.report() for fusion in constructed()],
            "refused": [decision for decision in runtime.decisions() if not decision["fuse"]],
        }

    def fse_reset(self) -> None:
        """Forget the calls of the engine's own warm-up."""
        for fusion in constructed():
            fusion.counter.reset()

    def fse_control(self, factor: float) -> None:
        """Multiply the weight of the first shared slot of the main model by ``factor``."""
        for fusion in constructed():
            if fusion.decision.role == "main":
                for router in fusion.routers.values():
                    router.control_factor = factor

    def fse_jitter(self, seed: int) -> None:
        """Give the 16-bit embedding the noise of one more rounding.

        Rounding is uniform within half a unit in the last place, variance 1/12; so each weight moves
        to a neighbouring value with probability 1/12. How far a model carries that is the yardstick
        where the kernels give the same bits for every batch composition, as they do on CPU.
        """
        for module in self.model_runner.model.modules():  # type: ignore[attr-defined]
            if type(module).__name__ == "VocabParallelEmbedding":
                weight = module.weight.data
                draw = torch.Generator().manual_seed(seed)
                moved = torch.rand(weight.shape, generator=draw) < 1 / 12
                step = torch.randint(0, 2, weight.shape, generator=draw) * 2 - 1
                # Adding 1 to the bits of a float gives its neighbour; zero has none below.
                step = (step * moved * (weight != 0).cpu()).to(weight.device, torch.int16)
                weight.view(torch.int16).add_(step)
