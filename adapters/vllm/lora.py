"""LoRA adapters that arrive while vLLM serves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..lora import check_adapter


def load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``_load_adapter``: vLLM leaves out in silence what --lora-target-modules does not name."""

    @functools.wraps(original)
    def load(self: Any, lora_request: Any) -> Any:
        adapter = original(self, lora_request)
        check_adapter(lora_request.lora_name, adapter.loras)
        return adapter

    return load
