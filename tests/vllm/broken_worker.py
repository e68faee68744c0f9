"""A fault in the process of a worker, which imports this module by the name of its extension."""

from __future__ import annotations

from fse_patch.lab.vllm.worker import VerifyExtension

from ..slot_faults import SLOT_FAULTS


class BrokenExtension(VerifyExtension):
    """What a verification asks a worker for; its slots are filled in part."""


SLOT_FAULTS["down_proj_dropped"]().start()
