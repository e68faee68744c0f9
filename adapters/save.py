"""Files of an engine's own that hold a model as it is in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..errors import FsePatchError
from .role import constructed


def save_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a method that writes such files: those of merged layers fit no other run."""

    @functools.wraps(original)
    def save(*args: Any, **kwargs: Any) -> Any:
        if any(role.layers and role.start.merged for role in constructed()):
            raise FsePatchError(
                "the experts in memory hold the shared expert as well, and files of them would load nowhere "
                "else; start with FSE_PATCH=0 to save the model"
            )
        return original(*args, **kwargs)

    return save
