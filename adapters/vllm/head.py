"""The LM head in vLLM: where it is applied, and its start behind the worker's ``load_model``."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ... import settings
from ...fusion_core.reasons import Reason
from ..head import EngineHead, format_refusals, holder_of, of_weight
from ..head_start import start_head
from .pair_proof import Engine


def apply_head(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``_apply_head`` of the logits processor: few tokens run from the copy, where there is one."""

    @functools.wraps(original)
    def apply(self: Any, lm_head: Any, hidden_states: torch.Tensor, embedding_bias: Any) -> Any:
        head = of_weight(lm_head) if embedding_bias is None else None
        logits = None if head is None else head.logits(hidden_states)
        return original(self, lm_head, hidden_states, embedding_bias) if logits is None else logits

    return apply


class OwnHead(EngineHead):
    """A head as vLLM has built it."""

    def apply(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits [num_tokens, N] of these rows, through the method that is patched."""
        logits: torch.Tensor = self.processor._apply_head(self.module, hidden_states, None)
        return logits


def worker_load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``load_model`` of the worker: the main model's head is quantised when all of it is built."""

    @functools.wraps(original)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if (holder := holder_of(self.get_model())) is not None:
            config = self.vllm_config
            own = OwnHead(holder.lm_head, holder.logits_processor)
            if isinstance(getattr(own.module, "weight", None), torch.Tensor):
                engine, model = Engine(config), config.model_config.model
                start_head(own, refusals(own, config), engine, settings.load(), model)
        return result

    return load


def refusals(own: OwnHead, config: Any) -> Iterator[Reason]:
    """Say what of vLLM's configuration, or of what it has built, keeps the head as it is."""
    model = config.model_config
    if config.lora_config is not None:
        yield Reason("lora", "LoRA adapters may change the LM head; run without --enable-lora")
    if model.enable_sleep_mode:
        yield Reason("memory.sleep", "weights leave the device in sleep; run without --enable-sleep-mode")
    if getattr(own.processor, "head_dtype", None) not in (None, model.dtype):
        yield Reason("head.format", f"head_dtype is {own.processor.head_dtype}, the model's is {model.dtype}")
    if os.environ.get("VLLM_BATCH_INVARIANT", "0").lower() in settings.TRUE:
        yield Reason("head.format", "VLLM_BATCH_INVARIANT asks for the same bits in every batch; unset it")
    yield from format_refusals(own.module)
