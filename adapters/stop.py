"""A line of its own for why a model is not served: engines bury the errors of their processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import FsePatchError

log = logging.getLogger("fse_patch")
# On errors that were told.
TOLD = "_fse_patch_told"


@contextmanager
def stop_told() -> Iterator[None]:
    """Say once in a line what stops a model, whichever hook it passes on its way out."""
    try:
        yield
    except FsePatchError as error:
        if not hasattr(error, TOLD):
            setattr(error, TOLD, True)
            log.critical("stopped: %s: %s", type(error).__name__, error)
        raise
