"""The canary in SGLang: behind the one function that its loaders fill and finish a model with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import prove
from ..load import ROLE


class Prover(prove.Prover):
    """A block as SGLang runs it."""

    def forward(self, block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run the block on [num_tokens, H] without a batch: it takes one for backends that are refused."""
        states: torch.Tensor = block(hidden_states)
        return states

    def parts(self, block: Any) -> int:
        """Return the size of tensor parallelism."""
        return int(block.experts.moe_tp_size)

    def all_reduce(self, states: torch.Tensor) -> torch.Tensor:
        """Sum [num_tokens, H] over tensor parallelism."""
        from sglang.srt.distributed.communication_op import tensor_model_parallel_all_reduce

        total: torch.Tensor = tensor_model_parallel_all_reduce(states)
        return total


def load_and_prove(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``load_weights_and_postprocess``: what was loaded fused is proved before the engine has it."""

    @functools.wraps(original)
    def load(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model, *args, **kwargs)
        prove_model(model)
        return result

    return load


def dummy_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``load_model`` of the loader that loads nothing: the canary says so."""

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        model = original(*args, **kwargs)
        prove_model(model)
        return model

    return load


def prove_model(model: Any) -> None:
    """Prove a model that was built fused; loaders run with the model's dtype as torch's default."""
    if (fused_role := getattr(model, ROLE, None)) is not None:
        prove.prove(fused_role, torch.get_default_dtype(), Prover())
