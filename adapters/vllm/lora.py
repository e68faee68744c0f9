"""LoRA adapters that arrive while vLLM serves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...fusion_core.checkpoint.headers import read_file_header
from ..lora import TENSORS, check_adapter


def load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``_load_adapter``: vLLM leaves out in silence what --lora-target-modules does not name."""

    @functools.wraps(original)
    def load(self: Any, lora_request: Any) -> Any:
        # First, as vLLM does not know modules that merged layers have dropped, and would say so instead.
        check_adapter(lora_request.lora_name, _names(lora_request.lora_path))
        adapter = original(self, lora_request)
        check_adapter(lora_request.lora_name, adapter.loras)
        return adapter

    return load


def _names(path: str) -> Iterable[str]:
    """Return names of an adapter's tensors by its headers; none where it has none, or is not here yet."""
    file = Path(path).expanduser() / TENSORS
    return read_file_header(file).entries if file.is_file() else ()
