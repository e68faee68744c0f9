"""The canary in vLLM: behind its loaders' ``load_model``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import prove
from ..load import ROLE
from .experts import check_output
from .fp8 import warm_up


class Prover(prove.Prover):
    """A block as vLLM runs it, without attention."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config

    def forward(self, block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run the block on [num_tokens, H] in a forward context of its own."""
        from vllm.config import set_current_vllm_config
        from vllm.forward_context import get_forward_context, set_forward_context

        with (
            set_current_vllm_config(self.vllm_config),
            set_forward_context(None, self.vllm_config, num_tokens=len(hidden_states)),
        ):
            # Otherwise the first call of a context is taken for one of the first layer.
            get_forward_context().all_moe_layers = None
            states: torch.Tensor = block(hidden_states)
        return states

    def parts(self, block: Any) -> int:
        """Return the size of tensor parallelism."""
        from vllm.distributed import get_tensor_model_parallel_world_size

        return int(get_tensor_model_parallel_world_size())

    def all_reduce(self, states: torch.Tensor) -> torch.Tensor:
        """Sum [num_tokens, H] over tensor parallelism."""
        from vllm.distributed import tensor_model_parallel_all_reduce

        total: torch.Tensor = tensor_model_parallel_all_reduce(states)
        return total


def load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``load_model`` of the loaders: what was loaded fused is proved before the engine has it."""

    @functools.wraps(original)
    def load(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, vllm_config, model_config, *args, **kwargs)
        if (fused_role := getattr(model, ROLE, None)) is not None:
            for layer in fused_role.layers.values():
                if layer.execution is not None:
                    check_output(layer.experts.quant_method.moe_kernel.impl.fused_experts)
            prove.prove(fused_role, model_config.dtype, Prover(vllm_config))
            warm_up(fused_role, vllm_config)
        return model

    return load
