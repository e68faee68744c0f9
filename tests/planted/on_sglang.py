"""SGLang up to the moment before it would serve: its own configuration, loader and classes."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch

import fse_patch

NAME = "sglang"
ONE = dict.fromkeys(
    ("tp_size", "pp_size", "attn_dp_size", "attn_cp_size", "moe_ep_size", "moe_dp_size", "attn_dcp_size"), 1
)


class Engine:
    """One process as SGLang's scheduler is, in which one model after the other is built and loaded."""

    def __init__(self, rendezvous: str) -> None:
        fse_patch.apply(NAME)
        self.arguments: Any = None

    def settle(self) -> None:
        gc.collect()
        gc.freeze()

    def _set_up(self, folder: str) -> Any:
        from sglang.srt import runtime_context
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.distributed import bootstrap
        from sglang.srt.layers.moe.utils import initialize_moe_config
        from sglang.srt.server_args import ServerArgs

        from fse_patch.lab.sglang.verify_arm import CPU_DEFAULTS, DEFAULTS, free_port

        arguments = ServerArgs(
            model_path=folder, dtype="float32", enable_multimodal=False, **DEFAULTS, **CPU_DEFAULTS
        )
        runtime_context.publish(arguments, role="scheduler")
        bootstrap.init_torch_distributed(
            server_args=arguments,
            model_config=ModelConfig.from_server_args(arguments, model_path=folder),
            device="cpu",
            ps=SimpleNamespace(tp_rank=0, pp_rank=0, gpu_id=0, **ONE),
            dist_port=free_port(),
            is_draft_worker=False,
            local_omp_cpuid=None,
        )
        initialize_moe_config()
        return arguments

    def load(self, folder: str, draft: bool = False) -> Any:
        """The model, as a scheduler has it when its loader is done."""
        from sglang.srt.configs.device_config import DeviceConfig
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
        from sglang.srt.layers.moe.utils import draft_model_build_scope
        from sglang.srt.model_loader import get_model

        self.arguments = self.arguments or self._set_up(folder)
        config = ModelConfig.from_server_args(self.arguments, model_path=folder, is_draft_model=draft)
        config = adjust_config_with_unaligned_cpu_tp(config, LoadConfig(), 1)  # as its own runner does
        with ExitStack() as stack:
            if draft:
                stack.enter_context(draft_model_build_scope())
            return get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))

    def warm_up(self, block: Any, hidden: torch.Tensor) -> None:
        """Run a block, as the engine's warm-up does before it serves."""
        from fse_patch.adapters.sglang.prove import Prover

        Prover().forward(block, hidden)

    def update(self, model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """A weight update, as SGLang makes it: into the parameters that run."""
        model.load_weights(weights)
