"""vLLM up to the moment before it would serve: its own configuration, loader and classes."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch

import fse_patch

NAME = "vllm"
SPECULATIVE = {"method": "mtp", "num_speculative_tokens": 1}
# Linear attention takes its state in float32; see docs/development.md.
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "skip_tokenizer_init": True,
    "language_model_only": True,
}


class Engine:
    """One process of vLLM, in which one model after the other is built and loaded."""

    def __init__(self, rendezvous: str) -> None:
        fse_patch.apply(NAME)
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        # There is nothing to free on a CPU, and asking raises; vLLM's CPU worker replaces it too.
        torch.accelerator.empty_cache = lambda: None
        self.rendezvous = rendezvous
        self._model: Any = None

    def settle(self) -> None:
        """What is loaded by now need not be walked each time that the loader collects garbage."""
        gc.collect()
        gc.freeze()

    def config(self, folder: str, draft: bool = False) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        speculative = {"speculative_config": SPECULATIVE} if draft else {}
        return EngineArgs(model=folder, **ARGUMENTS, **speculative).create_engine_config()

    def load(self, folder: str, draft: bool = False) -> Any:
        """The model, as a worker has it when its loader is done."""
        from vllm.config import set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel
        from vllm.distributed import parallel_state as groups
        from vllm.model_executor.model_loader import get_model

        self.vllm_config = self.config(folder, draft)
        with set_current_vllm_config(self.vllm_config):
            if not groups.model_parallel_is_initialized():
                init_distributed_environment(1, 0, f"file://{self.rendezvous}", 0, "gloo")
                initialize_model_parallel()
            if not draft:
                return get_model(vllm_config=self.vllm_config)
            chosen = self.vllm_config.speculative_config.draft_model_config
            return get_model(vllm_config=self.vllm_config, model_config=chosen)

    def warm_up(self, block: Any, hidden: torch.Tensor) -> None:
        """Run a block, as the engine's warm-up does before it serves."""
        from fse_patch.adapters.vllm.prove import Prover

        Prover(self.vllm_config).forward(block, hidden)

    def update(self, model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """A weight update, as vLLM's own reload makes it."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import reload

        with set_current_vllm_config(self.vllm_config):
            reload.initialize_layerwise_reload(model)
            model.load_weights(weights)
            reload.finalize_layerwise_reload(model, self.vllm_config.model_config)
