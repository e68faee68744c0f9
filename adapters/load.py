"""Replacement for ``load_weights`` of the entry classes, of either engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def load_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """``load_weights``: on a model that was built fused, the shared tensors go to their slots."""

    @functools.wraps(original)
    def load(self: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        fusion = getattr(self, "_fse_patch", None)
        if fusion is None:
            return original(self, weights, *args, **kwargs)
        return fusion.load(lambda stream: original(self, stream, *args, **kwargs), weights)

    return load
