"""What of an engine's configuration forbids to fuse a checkpoint that could: what both engines share."""

from __future__ import annotations

from collections.abc import Iterator

from .. import settings
from ..fusion_core.checkpoint.config import UNQUANTISED
from ..fusion_core.decision.layout import ExpertLayout
from ..fusion_core.decision.outcome import Merged
from ..fusion_core.decision.proven import unproven
from ..fusion_core.forward.plan import ModePlan, always
from ..fusion_core.forward.tuned import SLOWER, Situation, plan_for
from ..fusion_core.quant.claims import PLAIN
from ..fusion_core.quant.methods import READABLE, READERS, UNPACKED
from ..fusion_core.reasons import Reason

SHARED_GATE = "sigmoid_gate"


def unmeasured(allowed: bool, where: str) -> ModePlan | Reason:
    """Return what runs where nothing was measured: one mode if the user asks for it, or the refusal."""
    if allowed:
        return always("fused", f"{settings.ALLOW_UNMEASURED} is set; nothing was measured {where}")
    why = f"no measurement shows that fusing is not slower {where}; `fse-patch tune` makes one"
    return Reason("slower.unmeasured", why)


def measured(situation: Situation, effective: settings.Settings) -> ModePlan | Reason:
    """Return the plan for layers on a CUDA device: by a table, or stock's kernels on views."""
    plan = plan_for(situation, "cuda", effective.tuned_file)
    if isinstance(plan, ModePlan):
        return plan
    if plan == SLOWER:
        why = "a tuned table says that fusing is slower here for some number of tokens"
        return Reason("slower.measured", why)
    return unmeasured(effective.allow_unmeasured, "for this shape, dtype, device and release")


def without_graphs(flag: str) -> Reason:
    """Refuse to pair by itself where the engine captures no CUDA graphs: thresholds are measured in such."""
    why = f"with {flag} nothing runs in CUDA graphs, and layers are measured in those"
    return Reason("slower.unmeasured", f"{why}; {settings.LAYOUT}=paired takes it anyway")


def without_proof(decision: Merged, platform: str, effective: settings.Settings) -> Iterator[Reason]:
    """Refuse a quantised format that was not proven on ``platform``, named as `fse-patch plan` takes it.

    And one that the canary would be asked to prove, and cannot read.
    """
    if effective.allow_unproven or decision.quant_method == UNQUANTISED:
        return
    if form := unproven(decision, platform):
        where = f"{decision.engine} on {platform or 'this platform'}"
        yield Reason(
            "quant.unproven",
            f"{form} would fuse, but was never run fused in {where} and compared with stock",
        )
    unread = sorted(set(decision.formats) - READABLE.keys() - UNPACKED.keys())
    if unread and effective.verify != "off":
        why = f"the canary does not read {unread[0]}: nothing would prove what is loaded"
        yield Reason("quant.unproven", why)


def quantised_online(decision: Merged, method: str | None, built: object) -> Iterator[Reason]:
    """Refuse a checkpoint that the engine quantises, or quantises otherwise, while it loads.

    Args:
        method: what the engine runs, by its own name: of its --quantization, or as it found it.
        built: the engine's quantisation, None where it has none.
    """
    running, declared = (method or "").lower().replace("_", "-"), decision.read_as or decision.quant_method
    readers = READERS.get(declared, frozenset({declared}))
    plain = decision.quant_method == UNQUANTISED
    # vLLM can quantise what a checkpoint leaves plain.
    online = (
        PLAIN.format in decision.formats and getattr(built, "online_quantization_config", None) is not None
    )
    if plain and running in {"", *READERS[UNQUANTISED]}:
        online = online or built is not None
    elif plain:
        online = online or running not in readers
    if online:
        yield Reason(
            "quant.online",
            f"the checkpoint is quantised on the fly ({method or 'by an argument'}); load it as it is",
        )
    elif not plain and running and running not in readers:
        yield Reason(
            "quant.online",
            f"the checkpoint is {declared} and would be run as {method}; run without --quantization {method}",
        )


def undivided(
    layout: ExpertLayout,
    parts: int,
    block: tuple[int, int] | list[int] | None,
    flag: str,
    groups: int = 1,
) -> Iterator[Reason]:
    """Refuse sizes that do not divide over processes, with a number that would.

    Args:
        parts: of how many processes each holds a part of every expert.
        block: rows and columns of a weight that share a scale; None where there are none.
        flag: the argument that says how many processes there are.
        groups: of processes that share experts, where whole experts are spread over groups.
    """
    width, step = layout.moe_intermediate_size, max(block) if block else 1

    def divides(count: int) -> bool:
        return width % (count * step) == 0

    if parts > 1 and not divides(parts):
        fits = next((count for count in range(parts - 1, 1, -1) if divides(count)), 1)
        blocks = f" in blocks of {step}" if step > 1 else ""
        advice = f"run with {flag} {fits * groups}"
        why = f"experts are {width} wide, which does not divide by {parts}{blocks}; {advice}"
        yield Reason("parallel.tp", why)


def unshared(layout: ExpertLayout, ranks: int, flag: str) -> Iterator[Reason]:
    """Refuse a number of experts that does not divide over ``ranks`` processes, with a number that would.

    Args:
        flag: the argument that says how many processes there are.
    """
    total = layout.num_routed
    if total % ranks:
        fits = next(count for count in range(ranks - 1, 0, -1) if total % count == 0)
        why = f"{total} experts do not divide by {ranks}; run with {flag} {fits}"
        yield Reason("parallel.ep", why)
