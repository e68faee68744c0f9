"""Lets the second process of a model decide by an empty cache of the hub, as on a second machine.

Only while it decides: what the engine itself loads is as always. With the variable ALONE every process
decides for itself: the control.
"""

from __future__ import annotations

import os
from typing import Any

import wrapt

OTHER_CACHE, ALONE = "FSE_PATCH_TEST_OTHER_CACHE", "FSE_PATCH_TEST_DECIDE_ALONE"


def install() -> None:
    """Change both engines' starts, whichever is imported."""
    if os.environ.get(OTHER_CACHE):
        for engine in ("vllm", "sglang"):
            wrapt.register_post_import_hook(change, f"fse_patch.adapters.{engine}.start")


def change(start: Any) -> None:
    """Change the start of one engine."""
    start_of = start.start_of
    if os.environ.get(ALONE):
        start.first_of_replica = lambda settle, *_: settle()

    def elsewhere(*args: Any, **kwargs: Any) -> Any:
        from huggingface_hub import constants
        from torch import distributed

        if not distributed.is_initialized() or distributed.get_rank() != 1:
            return start_of(*args, **kwargs)
        before = constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE
        constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = os.environ[OTHER_CACHE], True
        try:
            return start_of(*args, **kwargs)
        finally:
            constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = before

    start.start_of = elsewhere
