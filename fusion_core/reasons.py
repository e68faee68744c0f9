"""The stable codes that say why a role fuses or does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, cast, get_args

Code = Literal[
    "ok",
    "family.unknown",
    "width.mismatch",
    "width.block",
    "activation.differs",
    "quant.mixed",
    "quant.contradiction",
    "quant.unknown",
    "quant.unproven",
    "quant.quark",
    "quant.mxfp4",
    "quant.nvfp4",
    "quant.online",
    "backend.routing",
    "backend.topk_format",
    "parallel.ep",
    "parallel.eplb",
    "parallel.dp",
    "parallel.pp",
    "lora",
    "routing.capture",
    "routing.simulator",
    "load.format",
    "config.differs",
    "evidence.unreadable",
    "version.untested",
    "fingerprint",
    "upstream.already",
    "slower.measured",
    "slower.unmeasured",
    "disabled",
]

FUSES: Final = "ok"


@dataclass(frozen=True)
class Reason:
    """Why something is not fused: a stable code, and one line for people with what was seen and where."""

    code: Code
    detail: str


REASONS: Mapping[Code, str] = {
    "ok": "fuses",
    "family.unknown": "the model is not of a known family, or has no layer with a shared expert",
    "width.mismatch": "the shared expert is not a whole number of routed experts wide, "
    "or the tensors have other sizes than config.json",
    "width.block": "a quantisation block would lie across two slots of the shared expert",
    "activation.differs": "the experts' activation is not SiLU, the one that splits and fuses exactly",
    "quant.mixed": "routed and shared experts are stored in different ways",
    "quant.contradiction": "config.json says one thing of the experts' quantisation, the tensors another",
    "quant.unknown": "nothing proves that this quantisation fuses rightly",
    "quant.unproven": "this format was not yet run and compared on this engine and platform",
    "quant.quark": "Quark checkpoints quantise routed and shared experts apart",
    "quant.mxfp4": "MXFP4 kernels take another layout for the shared expert",
    "quant.nvfp4": "NVFP4 scales of the shared expert are its own, and its kernels pack experts together",
    "quant.online": "weights are quantised, or quantised otherwise, while they load",
    "backend.routing": "the engine's kernel routes by itself",
    "backend.topk_format": "the engine's top-k output has no room for the shared slot",
    "parallel.ep": "experts are spread over ranks",
    "parallel.eplb": "experts move between ranks",
    "parallel.dp": "attention is data parallel, which is not proven yet",
    "parallel.pp": "layers are spread over pipeline stages, which is not proven yet",
    "lora": "adapters are attached to the experts",
    "routing.capture": "the engine records routed experts",
    "routing.simulator": "the engine simulates routing",
    "load.format": "this way of loading does not pass the tensors by their checkpoint names",
    "config.differs": "the engine runs another configuration than config.json describes",
    "evidence.unreadable": "the checkpoint's config.json or headers could not be read",
    "version.untested": "this release of the engine was not tested",
    "fingerprint": "the engine's source is not the one that was tested",
    "upstream.already": "this release fuses by itself, rightly",
    "slower.measured": "fusing was measured to be slower here",
    "slower.unmeasured": "fusing was not measured here and stock's way cannot be kept",
    "disabled": "fse_patch is not switched on",
}

# What the user's own arguments ask for: where strictness was asked for too, they stop the process.
CONTRADICTIONS: frozenset[Code] = frozenset(
    {
        "parallel.ep",
        "parallel.eplb",
        "parallel.dp",
        "parallel.pp",
        "lora",
        "backend.topk_format",
        "routing.capture",
        "routing.simulator",
        "load.format",
        "quant.online",
    }
)


def is_reason(code: str) -> bool:
    """Whether ``code`` is one of the stable codes."""
    return code in cast(tuple[str, ...], get_args(Code))
