"""LoRA adapters that arrive while SGLang serves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ...errors import FsePatchError
from ..lora import check_adapter


def load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a manager's method that loads an adapter's weights: what its config does not name comes too."""

    @functools.wraps(original)
    def load(self: Any, lora_ref: Any, *args: Any) -> Any:
        result = original(self, lora_ref, *args)
        names = (name for layer in self.loras[lora_ref.lora_id].layers for name in layer.weights)
        try:
            check_adapter(lora_ref.lora_name, names)
        except FsePatchError:
            del self.loras[lora_ref.lora_id]
            raise
        return result

    return load
