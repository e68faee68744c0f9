"""What the arms of an end-to-end measurement do in the process that holds the model: weights are drawn."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from ..errors import FsePatchError
from . import decoding, verifying
from .model_fusion import constructed
from .shared_sets import SharedSets

# Dummy weights alone send every token to the same experts: what routes, comes in and goes out is drawn anew.
DRAWN = ("gate.weight", "embed_tokens.weight", "lm_head.weight")
STD = 0.05


def spread(model: Any) -> None:
    """Draw those weights, in place and by their names, so that all arms have the same.

    GLM's norms become 1 and its correction of scores 0: those of the other families are centred on zero.
    """
    glm = type(model).__name__.startswith("Glm")
    for name, parameter in model.named_parameters():
        if name.endswith(DRAWN):
            draw = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            parameter.data.normal_(0, STD, generator=draw)
        elif name.endswith("e_score_correction_bias"):
            parameter.data.zero_()
        elif glm and name.endswith("norm.weight"):
            parameter.data.fill_(1)
    # Modes read gates from tensors of their own.
    for fusion in constructed():
        fusion.refresh_gates()


def opened(model: Any, sets: SharedSets) -> dict[str, Any]:
    """Draw the weights of ``model``, in its process, and say what is there, or ``error``."""
    spread(model)
    try:
        return {**verifying.report(), "device": decoding.device(), "shared": sets.check()}
    except FsePatchError as error:
        return {"error": str(error)}
