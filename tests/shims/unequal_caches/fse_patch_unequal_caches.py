"""Lets the second process of a model decide by an empty cache of the hub, as on a second machine.

Only while it decides: what the engine itself loads is as always. Processes then compare what they decided,
and stop where it differs. With the variable ALONE every process decides for itself: the control.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import wrapt

OTHER_CACHE, ALONE = "FSE_PATCH_TEST_OTHER_CACHE", "FSE_PATCH_TEST_DECIDE_ALONE"


def install() -> None:
    """Change both engines' starts, whichever is imported."""
    if os.environ.get(OTHER_CACHE):
        for engine in ("vllm", "sglang"):
            wrapt.register_post_import_hook(change, f"fse_patch.adapters.{engine}.build")


def change(build: Any) -> None:
    """Change the start of one engine, where it is called: an arm has imported it before any plugin comes."""
    start_of = build.start_of
    if os.environ.get(ALONE):
        sys.modules[start_of.__module__].first_of_replica = lambda settle, *_: settle()  # type: ignore[attr-defined]

    def elsewhere(*args: Any, **kwargs: Any) -> Any:
        from huggingface_hub import constants
        from torch import distributed

        if distributed.get_rank() != 1:
            return start_of(*args, **kwargs)
        before = constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE
        constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = os.environ[OTHER_CACHE], True
        try:
            return start_of(*args, **kwargs)
        finally:
            constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = before

    def compared(*args: Any, **kwargs: Any) -> Any:
        from torch import distributed

        from fse_patch.errors import FsePatchError

        if not distributed.is_initialized():
            return start_of(*args, **kwargs)
        start = elsewhere(*args, **kwargs)
        all_here = [""] * distributed.get_world_size()
        distributed.all_gather_object(all_here, type(start).__name__)
        if len(set(all_here)) > 1:
            raise FsePatchError(f"the processes decided differently: {', '.join(all_here)}")
        return start

    build.start_of = compared
