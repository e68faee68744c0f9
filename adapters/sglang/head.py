"""The LM head in SGLang: where it is applied, and its start behind a model runner's ``load_model``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ... import settings
from ...fusion_core.reasons import Reason
from ..head import EngineHead, constructed, format_refusals, holder_of, of_weight
from ..head_start import start_head
from .pair_proof import Engine

# Arguments under which logits are computed in another way, or by other processes.
OTHERWISE = {
    "enable_fp32_lm_head": "head.format",
    "enable_torch_compile": "head.format",
    "enable_deterministic_inference": "head.format",
    "rl_on_policy_target": "head.format",
    "enable_dp_attention": "parallel.dp",
    "enable_dp_lm_head": "parallel.dp",
    "enable_memory_saver": "memory.sleep",
    "enable_lora": "lora",
}
# What the model's own config asks of its logits processor.
IN_FLOAT32 = ("use_fp32_lm_head", "use_fp32_lm_head_output")


def compute_lm_head(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``_compute_lm_head`` of the logits processor: few tokens run from the copy, if there is one."""

    @functools.wraps(original)
    def compute(
        self: Any, hidden_states: torch.Tensor, lm_head: Any, embedding_bias: Any = None, **kwargs: Any
    ) -> Any:
        head = of_weight(lm_head) if embedding_bias is None else None
        logits = None if head is None else head.logits(hidden_states)
        return original(self, hidden_states, lm_head, embedding_bias, **kwargs) if logits is None else logits

    return compute


class OwnHead(EngineHead):
    """A head as SGLang has built it."""

    def apply(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits [num_tokens, N] of these rows, through the method that is patched."""
        logits: torch.Tensor = self.processor._compute_lm_head(hidden_states, self.module)
        return logits


def runner_load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``load_model`` of the model runner: the main model's head is quantised when it is there.

    A draft takes the main model's weight afterwards, and the copy with it; a head of its own stays.
    """

    @functools.wraps(original)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if not self.is_draft_worker and (holder := holder_of(self.model)) is not None:
            own = OwnHead(holder.lm_head, holder.logits_processor)
            if isinstance(getattr(own.module, "weight", None), torch.Tensor):
                start_head(own, refusals(own), Engine(), settings.load(), self.model_config.model_path)
        return result

    return load


def update_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``update_weights_from_tensor``, of which a part writes weights without their loaders."""

    @functools.wraps(original)
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        for head in constructed():
            head.updated()
        return result

    return update


def refusals(own: OwnHead) -> Iterator[Reason]:
    """Say what of SGLang's arguments, or of what it has built, keeps the head as it is."""
    from sglang.srt.runtime_context import get_server_args

    given = get_server_args()
    for name, code in OTHERWISE.items():
        if value := getattr(given, name, None):
            yield Reason(code, f"{name} is {value}; run without it")  # type: ignore[arg-type]
    if any(getattr(own.processor, name, False) for name in IN_FLOAT32):
        yield Reason("head.format", "the model's config asks for logits in float32")
    if getattr(own.module, "use_intel_amx_backend", False):
        yield Reason("head.format", "its weight is packed for AMX")
    yield from format_refusals(own.module)
