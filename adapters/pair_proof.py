"""The start of paired roles, before anything is served: proof, threshold, and the line that says both.

Both arms of proof and measurement end below the reduction over processes, so none waits for another. What
they found is shared at two points that every process reaches, whatever failed in it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from .. import runtime
from ..errors import RefusedError, words
from ..fusion_core.forward.threshold import ROUTINGS, SIZES
from ..fusion_core.proof.paired import Errors, errors_of, fault, gate_fault, inputs_of
from ..fusion_core.reasons import Reason
from .expert_reading import Unreadable
from .loaded_pairs import LoadedPairs, PairProof, failed
from .pair_canary import told
from .pair_threshold import Chosen, choose
from .paired import EngineLayer, PairedEngine, PairedRole

log = logging.getLogger("fse_patch")
Value = TypeVar("Value")


def start_roles(roles: Iterable[PairedRole], engine: PairedEngine) -> None:
    """Prove and open every role that has not been; every process of a model calls this at the same point."""
    for role in roles:
        if role.loaded is None:
            _start(role, engine)


def _start(role: PairedRole, engine: PairedEngine) -> None:
    settings = role.start.settings
    sizes = _sizes(settings.cpu_threshold)
    proof = _guarded(lambda: prove(role, engine, sizes), failed)
    # One process's failure switches all off: they serve one model.
    others = [other for other in engine.gather(proof) if other.state == "failed"]
    if others:
        why = proof.detail or f"in another process: {others[0].detail}"
        chosen = Chosen(0, "", Reason(others[0].code, why))
    else:
        chosen = _guarded(lambda: choose(role, engine), _unmeasured)
        least = min(engine.gather(chosen), key=lambda other: other.tokens)
        chosen = Chosen(
            least.tokens, chosen.source, chosen.reason or least.reason, chosen.seconds, chosen.bounds
        )
    held = {} if others else role.held()
    role.set_threshold(chosen.tokens)
    role.loaded = LoadedPairs(
        held,
        proof,
        chosen.tokens,
        chosen.source,
        chosen.reason,
        role.loads,
        chosen.seconds,
        chosen.bounds,
    )
    role.counter.reset()  # these were no calls of the model
    # An update may come in many parts: the ends of the range will do.
    ends = (1, max(chosen.tokens, 1))
    role.prove_again = lambda: _guarded(lambda: prove(role, engine, ends), failed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    _tell(role, proof, chosen)


def _unmeasured(error: Exception) -> Chosen:
    return Chosen(0, "", Reason("slower.unmeasured", words(error)))


def _guarded(run: Callable[[], Value], otherwise: Callable[[Exception], Value]) -> Value:
    """Run something that must not keep this process from the point where all meet."""
    try:
        return run()
    except Exception as error:
        log.debug("a paired role stays off", exc_info=True)
        return otherwise(error)


def _tell(role: PairedRole, proof: PairProof, chosen: Chosen) -> None:
    decision, reason = role.start.decision, chosen.reason
    head = f"{decision.engine}, {decision.role} model"
    runtime.changed()
    if reason is None:
        log.info(
            "%s: shared expert paired up to %d tokens (%s): %s; proof %s in %.2f s",
            head,
            chosen.tokens,
            chosen.source,
            decision.detail,
            proof.state,
            proof.seconds,
        )
        return
    runtime.record_decision(decision.refused(reason).to_dict())
    log.warning("%s: not paired: %s: %s; the engine's own layers serve", head, reason.code, reason.detail)
    if reason.code == "proof.failed" and role.start.settings.strict:
        print(f"fse_patch: {head}: {reason.code}: {reason.detail}", file=sys.stderr, flush=True)
        raise SystemExit(RefusedError.exit_status)


def _sizes(cpu_threshold: int) -> tuple[int, ...]:
    """Return numbers of tokens to prove: every power of two up to the most that may run, and the most."""
    most = cpu_threshold or SIZES[-1]
    return tuple(sorted({*(size for size in SIZES if size <= most), most}))


def prove(role: PairedRole, engine: PairedEngine, sizes: tuple[int, ...]) -> PairProof:
    """Compare layers with the engine's own forward, as FSE_PATCH_VERIFY says.

    Raises:
        Unreadable: the engine keeps weights in a layout that the pass does not read.
    """
    begun = time.perf_counter()
    if role.unbuilt:
        raise Unreadable(role.unbuilt)
    held = role.held()
    if not held:
        raise Unreadable("no layer was built in the way that is known")
    verify = role.start.settings.verify
    if verify == "off":
        log.warning("%s model: paired layers are not proved: FSE_PATCH_VERIFY is off", role.name)
        return PairProof("off")
    numbers = sorted(role.layers) if verify == "all" else _one_of_each(role)
    worst = Errors(0.0, 0.0, 0.0)
    for number in numbers:
        layer = role.layers[number]
        quantised = "float8" in "".join(held[number].formats)
        for routing in ROUTINGS:
            errors, problem = _compare(layer, engine, sizes, routing, quantised)
            if problem:
                seconds = time.perf_counter() - begun
                detail = f"layer {number}, {problem}"
                return PairProof("failed", (number,), *_numbers(errors), seconds=seconds, detail=detail)
            worst = max(worst, errors, key=lambda e: e.between)
    # After an update the files are no more what is served.
    said = told(role, numbers[0], engine) if role.loaded is None else ""
    seconds = time.perf_counter() - begun
    return PairProof("passed", tuple(numbers), *_numbers(worst), seconds=seconds, canary=said)


def _numbers(errors: Errors) -> tuple[float, float, float]:
    return errors.between, errors.ours, errors.stock


def _one_of_each(role: PairedRole) -> list[int]:
    """Return one layer of each shape and format."""
    seen: dict[Any, int] = {}
    for number, layer in sorted(role.layers.items()):
        now = layer.read()
        shapes = (now.routed.w13.shape, None if now.shared is None else now.shared.w13.shape)
        seen.setdefault((*shapes, now.formats), number)
    return list(seen.values())


@torch.inference_mode()
def _compare(
    layer: EngineLayer, engine: PairedEngine, sizes: tuple[int, ...], routing: str, quantised: bool
) -> tuple[Errors, str]:
    """Return the largest errors of one layer over all sizes, and what is wrong with it, or ""."""
    layout, now = layer.layer.moe.layout, layer.read()
    dtype, device = layer.dtype, now.routed.w13.device
    inputs = inputs_of(layout, sizes[-1], routing, dtype, layer.logits_dtype, device)
    with engine.context(sizes[-1]):
        reference = layer.exact(inputs.hidden_states, inputs.logits)
        for ours, stock in layer.gates(inputs.hidden_states):
            if problem := gate_fault(ours, stock):
                return Errors(0.0, 0.0, 0.0), problem
    worst = Errors(0.0, 0.0, 0.0)
    for size in sizes:
        states, logits = inputs.hidden_states[:size], inputs.logits[:size]
        with engine.context(size):
            stock = layer.stock(states.clone(), logits.clone())
            ours = layer.ours(states.clone(), logits.clone())
        errors = errors_of(ours, stock, reference[:size])
        if problem := fault(errors, dtype, quantised):
            return errors, f"{size} tokens, {routing} routing: {problem}"
        worst = max(worst, errors, key=lambda e: e.between)
    return worst, ""
