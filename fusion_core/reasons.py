"""Stable codes that say why a role fuses or does not, and what each means: the one table of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Code = Literal[
    "ok",
    "family.unknown",
    "names.unknown",
    "shared.absent",
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
    "quant.layout",
    "quant.online",
    "backend.routing",
    "backend.topk_format",
    "backend.layout",
    "device.unrun",
    "proof.failed",
    "parallel.tp",
    "parallel.ep",
    "parallel.eplb",
    "parallel.all2all",
    "parallel.dp",
    "lora",
    "memory.offload",
    "memory.sleep",
    "routing.capture",
    "routing.simulator",
    "load.format",
    "config.differs",
    "evidence.unreadable",
    "version.untested",
    "fingerprint",
    "release.seam",
    "upstream.already",
    "upstream.wrong",
    "slower.measured",
    "slower.unmeasured",
    "head.format",
    "head.proof",
    "head.inaccurate",
    "disabled",
]

FUSES: Final = "ok"


@dataclass(frozen=True)
class Reason:
    """Reason why something is not fused: a stable code, and a line for people with what was seen where."""

    code: Code
    detail: str


@dataclass(frozen=True)
class Meaning:
    """Meaning of a code, in one sentence, and what a user can do about it; "" where nothing is to be done.

    Args:
        asked_for: the user's own arguments contradict fusing: where strictness was asked for too, they stop
            the process.
    """

    text: str
    advice: str = ""
    asked_for: bool = False


_UNMEASURED = "`fse-patch tune` measures; FSE_PATCH_ALLOW_UNMEASURED=1 fuses anyway"
REASONS: Mapping[Code, Meaning] = {
    "ok": Meaning("The role fuses."),
    "family.unknown": Meaning("The model is of no known family, or has no layer with a shared expert."),
    "names.unknown": Meaning(
        "The checkpoint has tensors of experts under names that are not known, or under two names."
    ),
    "shared.absent": Meaning("The model has no shared expert: there is nothing to fuse."),
    "width.mismatch": Meaning(
        "The shared expert is not a whole number of routed experts wide, or tensors have other sizes than "
        "`config.json` says."
    ),
    "width.block": Meaning("A quantisation block would lie across two slots of a wide shared expert."),
    "activation.differs": Meaning(
        "The experts' activation is not SiLU, the one that splits and fuses exactly."
    ),
    "quant.mixed": Meaning("Routed and shared experts are stored in different ways."),
    "quant.contradiction": Meaning(
        "`config.json` says one thing of how the experts are quantised, their tensors another."
    ),
    "quant.unknown": Meaning("A quantisation, or a word in its config, is not known to be safe."),
    "quant.unproven": Meaning(
        "By all evidence it may fuse, but this format was not yet run fused on this engine and platform, or "
        "the canary does not read it.",
        "FSE_PATCH_ALLOW_UNPROVEN=1 tries it",
    ),
    "quant.quark": Meaning("Quark checkpoints quantise routed and shared experts apart."),
    "quant.mxfp4": Meaning("MXFP4 kernels take another layout for the shared expert."),
    "quant.nvfp4": Meaning(
        "NVFP4 scales of the shared expert are of its own, and kernels pack experts together."
    ),
    "quant.layout": Meaning(
        "A setting, or the checkpoint, has the engine keep 4-bit experts in a layout that the kernels for "
        "few tokens do not read.",
        "run without the setting",
    ),
    "quant.online": Meaning(
        "The engine quantises while it loads: a plain checkpoint, or one that `--quantization` gives another "
        "method than its own.",
        "load it as it is",
        asked_for=True,
    ),
    "backend.routing": Meaning(
        "The engine's expert backend routes by itself, or shares experts out by their number (KTransformers)."
    ),
    "backend.topk_format": Meaning(
        "The engine passes routing results in a form without room for the shared slots.",
        "choose another MoE runner",
        asked_for=True,
    ),
    "backend.layout": Meaning(
        "The engine lays experts out, shares them out or packs them in a way that is not known here.",
        "run without it",
        asked_for=True,
    ),
    "device.unrun": Meaning(
        "Nobody has run the paired layout there yet: on an AMD GPU, or for 4-bit experts in SGLang.",
        "FSE_PATCH_LAYOUT=paired takes it anyway",
    ),
    "proof.failed": Meaning(
        "Paired layers gave other answers than the engine's own, at start or after an update; its own serve.",
        "please report it",
    ),
    "parallel.tp": Meaning(
        "The experts' width does not divide over so many processes.",
        "run with the number that the line names",
        asked_for=True,
    ),
    "parallel.ep": Meaning(
        "Whole experts are spread over processes, and the kernels here do not leave out what others hold.",
        "run without it",
        asked_for=True,
    ),
    "parallel.eplb": Meaning("The expert load balancer moves experts.", "run without it", asked_for=True),
    "parallel.all2all": Meaning(
        "Tokens are sent to the processes of their experts, or cut up between processes.",
        "run without it",
        asked_for=True,
    ),
    "parallel.dp": Meaning(
        "Attention is data parallel: layers see the tokens of other processes, which is not proven yet.",
        "run without it",
        asked_for=True,
    ),
    "lora": Meaning(
        "Adapters may change experts, or the gates of a sparse block.",
        "limit adapters to modules of the attention",
        asked_for=True,
    ),
    "memory.offload": Meaning(
        "Weights stay in the host's memory, or move to and fro.", "run without it", asked_for=True
    ),
    "memory.sleep": Meaning(
        "Weights may leave the device while the engine sleeps, which is not proven yet.",
        "run without it",
        asked_for=True,
    ),
    "routing.capture": Meaning("The engine records routed experts.", "run without it", asked_for=True),
    "routing.simulator": Meaning("The engine simulates routing.", "run without it", asked_for=True),
    "load.format": Meaning(
        "This way of loading, or of updating, does not pass the tensors by their checkpoint names, or reads "
        "files without headers.",
        "load as `auto` or `safetensors`",
        asked_for=True,
    ),
    "config.differs": Meaning(
        "The engine runs another MoE configuration than `config.json` describes.", "run without overrides"
    ),
    "evidence.unreadable": Meaning("`config.json` or the headers of the checkpoint could not be read."),
    "version.untested": Meaning(
        "This release of the engine is older than every listed one; or, in `plan`, it is not listed and not "
        "installed, so that its code cannot be compared.",
        "install one of docs/releases.md",
    ),
    "fingerprint": Meaning("The engine's source is not the one that the patches were written for."),
    "release.seam": Meaning(
        "The release is newer than the listed ones, and a definition that the patches need reads otherwise.",
        "wait for a version of fse_patch that lists it, or install one of docs/releases.md",
    ),
    "upstream.already": Meaning("This release fuses the model by itself, and rightly."),
    "upstream.wrong": Meaning(
        "The engine itself builds other layers than the checkpoint has: its own answers are wrong.",
        "run it in another engine",
    ),
    "slower.measured": Meaning("A tuned table says that fusing is slower here for some number of tokens."),
    "slower.unmeasured": Meaning(
        "Nobody has measured fusing here, and stock's way cannot be kept.", _UNMEASURED
    ),
    "head.format": Meaning(
        "The LM head, or the way in which the engine applies it, is not one that is quantised at load.",
        "run without FSE_PATCH_LM_HEAD",
    ),
    "head.proof": Meaning(
        "The quantised LM head gave a row of logits that rounding does not explain; the engine's own serves.",
        "please report it",
    ),
    "head.inaccurate": Meaning(
        "The LM head loses more by quantisation than is allowed; the engine's own serves.",
        "run without FSE_PATCH_LM_HEAD",
    ),
    "disabled": Meaning("It is switched off, by a setting, an argument or the policy."),
}
CONTRADICTIONS: frozenset[Code] = frozenset(code for code, meaning in REASONS.items() if meaning.asked_for)
