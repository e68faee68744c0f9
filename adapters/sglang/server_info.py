"""What SGLang's server info says of fse_patch, for each scheduler that it asks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ... import runtime
from .native import ENGINE

# In the state of a scheduler, as /server_info shows it.
KEY = "fse_patch"


def get_internal_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``Scheduler.get_internal_state``: its answer has what `fse_patch.status` says there."""

    @functools.wraps(original)
    def state(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        answer.internal_state[KEY] = runtime.answer(ENGINE)
        return answer

    return state
