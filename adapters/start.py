"""The decision for one role, made while an engine starts: checkpoint first, then runtime."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from .. import metrics, runtime, settings
from ..errors import FsePatchError, RefusedError
from ..fusion_core.checkpoint.config import UNQUANTISED
from ..fusion_core.checkpoint.families import Role, family_of
from ..fusion_core.decision.decide import decide
from ..fusion_core.decision.outcome import FusionDecision
from ..fusion_core.decision.policy_file import load_policy
from ..fusion_core.decision.proven import unproven
from ..fusion_core.quant.methods import READABLE
from ..fusion_core.reasons import CONTRADICTIONS, Reason
from .patching import ledger

log = logging.getLogger("fse_patch")
Refusal = tuple[Reason, str]


def settle(
    engine: str,
    role: Role,
    locate: Callable[[], Path],
    refusals: Callable[[FusionDecision], Iterable[Refusal]],
    remark: Callable[[FusionDecision], str] = lambda _: "",
) -> FusionDecision:
    """Decide, record the decision and say it in a line.

    Args:
        locate: the checkpoint's folder; an FsePatchError is a refusal.
        refusals: what of the runtime configuration forbids to fuse, first reason first.
        remark: what else is done about a decision; goes into its line.

    Raises:
        SystemExit: the arguments contradict fusing, and FSE_PATCH_STRICT is set: nothing has been read yet.
    """
    decision = from_checkpoint(engine, role, locate)
    if decision.fuse and (refusal := next(iter(refusals(decision)), None)):
        reason, detail = refusal
        decision = dataclasses.replace(decision, fuse=False, reason=reason, detail=detail, fused_layers=())
        if reason in CONTRADICTIONS and settings.load().strict_arguments:
            print(f"fse_patch: {engine}: {reason}: {detail}", file=sys.stderr, flush=True)
            raise SystemExit(RefusedError.exit_status)
    decision = dataclasses.replace(decision, detail=decision.detail + remark(decision))
    announce(decision)
    return decision


def from_checkpoint(engine: str, role: Role, locate: Callable[[], Path]) -> FusionDecision:
    """The decision that the checkpoint leads to; one that cannot be read is refused."""
    policy = load_policy(settings.load().policy_file)
    try:
        return decide(locate(), engine, role, policy)
    except FsePatchError as error:
        return FusionDecision(role, False, "evidence.unreadable", str(error), "", engine, "")


def checkpoint_folder(model: str, revision: str | None, cache: str | None) -> Path:
    """The folder that an engine loads from; a hub name is looked up in the local cache alone."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))
    except Exception as error:
        raise FsePatchError(
            f"{model}: not a folder and not in the local hub cache; download it first"
        ) from error


def config_difference(decision: FusionDecision, config: Any) -> str:
    """How the configuration that runs differs from the one that was decided on, or ""."""
    family, layout, routing = family_of(decision.model_type), decision.layout, decision.routing
    assert family is not None
    assert layout is not None
    assert routing is not None
    expected = {
        family.num_experts_key: layout.num_routed,
        family.top_k_key: layout.top_k,
        "hidden_size": layout.hidden_size,
        "moe_intermediate_size": layout.moe_intermediate_size,
        "norm_topk_prob": routing.renormalize,
        "routed_scaling_factor": routing.routed_scaling_factor,
    }
    seen = {name: getattr(config, name, value) for name, value in expected.items()}
    differing = [f"{n} is {seen[n]!r}, config.json says {v!r}" for n, v in expected.items() if seen[n] != v]
    first, last, built = decision.moe_layers[0], decision.moe_layers[-1], config.num_hidden_layers
    fits = last < built if decision.role == "main" else first == built or not family.draft_after_main
    if not fits:
        differing.append(f"num_hidden_layers is {built}, config.json says otherwise")
    return "; ".join(differing)


def proof(decision: FusionDecision, platform: str) -> Iterator[Refusal]:
    """Refuse a quantised format that was not proven on ``platform``, named as `fse-patch plan` takes it.

    And one that the canary would be asked to prove, and cannot read.
    """
    if settings.load().allow_unproven or decision.quant_method == UNQUANTISED:
        return
    if form := unproven(decision, platform):
        where = f"{decision.engine} on {platform or 'this platform'}"
        yield (
            "quant.unproven",
            f"{form} would fuse, but was never run fused in {where} and compared with stock",
        )
    unread = sorted(set(decision.formats) - READABLE.keys())
    if unread and settings.load().verify != "off":
        yield "quant.unproven", f"the canary does not read {unread[0]}: nothing would prove what is loaded"


def announce(decision: FusionDecision) -> None:
    """Record a decision, and say in one line a role: on and where, or why not."""
    runtime.record_decision(decision.to_dict())
    metrics.publish()
    head = f"{decision.engine}, {decision.role} model"
    if decision.fuse:
        log.info("%s: shared expert fused: %s", head, decision.detail)
    else:
        log.warning("%s: not fused: %s: %s", head, decision.reason, decision.detail)


@cache
def entry_roles(engine: str) -> dict[str, Role]:
    """Role of each entry class of an engine, by ``module:class``."""
    return dict(ledger.load(engine).roles)


def role_of(engine: str, cls: type) -> Role | None:
    """The role of an entry class; None for every other class."""
    return entry_roles(engine).get(f"{cls.__module__}:{cls.__qualname__}")


def announce_other(engine: str, cls: type) -> None:
    """Say of a model that is not an entry class that it stays stock: silence never means on."""
    if role_of(engine, cls) is None:
        detail = f"{cls.__name__} is not a model class that fse_patch knows"
        announce(FusionDecision("main", False, "family.unknown", detail, "", engine, ""))
