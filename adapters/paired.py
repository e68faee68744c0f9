"""One paired role of one model in this process: its layers run in one pass for few tokens, else as stock."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch

from .. import runtime
from ..errors import FsePatchError, words
from ..fusion_core.checkpoint.families import Role
from ..fusion_core.forward.paired import OutputScale, PairedLayer, PairedWeights
from ..fusion_core.forward.plan import ModeCounter
from ..fusion_core.reasons import Reason
from .expert_reading import Unreadable
from .load import LOADER
from .loaded_pairs import HeldLayer, LoadedPairs, PairProof, failed
from .start import PairedStart
from .stop import stop_told

log = logging.getLogger("fse_patch")


class EngineLayer(ABC):
    """One layer as an engine has built it, and both ways to run it below the reduction over processes.

    Args:
        layer: the paired forward, which reads its weights through `read`.
    """

    # Backends that keep rows of gate before rows of up, as they were loaded.
    readable: frozenset[str] = frozenset()
    # What the engine multiplies the sum by afterwards.
    after = 1.0

    def __init__(self, number: int, role: PairedRole) -> None:
        self.layer = PairedLayer(number, role.start.decision.moe, self.read, role.counter)
        # What a CPU packs, as it was loaded; for tests.
        self.copied: PairedWeights | None = None

    def read(self) -> PairedWeights:
        """Return what is in memory now.

        Raises:
            Unreadable: the engine keeps it in a layout that the pass does not read.
        """
        if self.copied is not None:
            return self.copied
        if self.backend not in self.readable:
            raise Unreadable(f"the engine runs experts by {self.backend or 'a kernel that is not known'}")
        return self.in_memory()

    def copy(self) -> None:
        """Copy the weights that were just loaded: for tests on a CPU, where engines pack them next.

        What cannot be read stays where it is, and is refused when it is asked for.
        """
        with suppress(Unreadable):
            self.copied = self.in_memory().copy()

    def refresh(self) -> None:  # noqa: B027 - few engines keep any
        """Renew what the engine has made of its weights and keeps, after an update."""

    @abstractmethod
    def parameters(self) -> Iterable[torch.Tensor]:
        """Yield the parameters that an update may replace."""

    @abstractmethod
    def in_memory(self) -> PairedWeights:
        """Return what is in memory now, whoever runs it."""

    @abstractmethod
    def stock(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Run the engine's own forward [num_tokens, H], routed by ``logits``; its gate runs as well."""

    @abstractmethod
    def ours(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Run the paired forward in the same way."""

    @abstractmethod
    def scale(self, hidden_states: torch.Tensor) -> OutputScale:
        """Return the factors of the sum."""

    def exact(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return what both should give, in float32."""
        return self.layer.exact(hidden_states, logits, self.scale(hidden_states)) * self.after

    @abstractmethod
    def gates(self, hidden_states: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Yield logits as the pass computes them, and by the engine's gates: router, then shared."""

    @abstractmethod
    def engine_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return router logits [num_tokens, E] by the engine's own gate."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Return the dtype of hidden states."""

    @property
    @abstractmethod
    def logits_dtype(self) -> torch.dtype:
        """Return the dtype that the engine routes by."""

    @property
    @abstractmethod
    def backend(self) -> str:
        """Return the engine's word for who runs its grouped GEMM."""


class PairedEngine(ABC):
    """What differs between engines around the layers of a role."""

    @abstractmethod
    def context(self, num_tokens: int) -> AbstractContextManager[Any]:
        """Return what layers run in outside of serving."""

    @abstractmethod
    def group(self) -> Any:
        """Return the engine's group of processes of tensor parallelism, which share the layers."""

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each process that shares the layers, in their order."""
        group = self.group()
        values: list[Any] = [value] * group.world_size
        if group.world_size > 1:
            torch.distributed.all_gather_object(values, value, group=group.cpu_group)
        return values

    def processes(self) -> int:
        """Return how many processes share the layers."""
        return int(self.group().world_size)

    @abstractmethod
    def release(self) -> str:
        """Return the engine's release."""


class PairedRole:
    """The paired layers of one role."""

    def __init__(self, start: PairedStart) -> None:
        self.start = start
        self.layers: dict[int, EngineLayer] = {}
        self.counter = ModeCounter()
        # Why a layer could not be taken in: then the engine runs all of them.
        self.unbuilt = ""
        self.loads = 0
        # None until weights are in memory and `pair_proof` has run.
        self.loaded: LoadedPairs | None = None
        # Proves the layers once more, after an update: set by `pair_proof`.
        self.prove_again: Callable[[], PairProof] | None = None

    @property
    def name(self) -> Role:
        """Return "main" or "draft"."""
        return self.start.decision.role

    def take(self, number: int, wrap: Callable[[], EngineLayer]) -> None:
        """Take in a layer that the engine has built; where that fails the role stays the engine's.

        Args:
            wrap: puts our forward before the engine's; until a threshold is set the engine's runs.
        """
        try:
            self.layers[number] = wrap()
        except Exception as error:  # what was replaced runs the engine's own: a server starts
            log.debug("layer %d of the %s model is not paired", number, self.name, exc_info=True)
            self.unbuilt = f"layer {number} is not built in the way that is known: {words(error)}"

    def set_threshold(self, tokens: int) -> None:
        """Run up to ``tokens`` paired from now on, in every layer."""
        for layer in self.layers.values():
            layer.layer.threshold = tokens

    def held(self) -> dict[int, HeldLayer]:
        """Return what every layer reads now.

        Raises:
            Unreadable: the engine keeps something in a layout that the pass does not read.
        """
        now = {number: layer.read() for number, layer in self.layers.items()}
        return {number: HeldLayer(held.addresses, held.formats) for number, held in now.items()}

    def after_load(self) -> None:
        """Note that the engine has loaded weights; on a CPU, copy them if a test asks for that."""
        self.loads += 1
        if self.start.settings.cpu_threshold:
            for layer in self.layers.values():
                layer.copy()

    @stop_told()
    def updated(self) -> None:
        """Look at the weights anew after an update of a running model, and prove them.

        Raises:
            FsePatchError: a captured graph holds addresses that are gone, or what it computes is wrong now.
        """
        if self.loaded is None or self.prove_again is None or not self.loaded.threshold:
            return
        for layer in self.layers.values():
            layer.refresh()
        try:
            held = self.held()
        except Unreadable as error:
            held, proof = {}, failed(error)
        else:
            self._refuse_moved(held)
            proof = self.prove_again()
        reason, threshold = self.loaded.reason, self.loaded.threshold
        if proof.state == "failed":
            reason, threshold = Reason(proof.code, f"after an update: {proof.detail}"), 0
            if any(layer.layer.captured for layer in self.layers.values()):
                raise FsePatchError(
                    f"{self.name} model: {reason.detail}; captured CUDA graphs would serve it"
                )
            said = f"{reason.code}: {reason.detail}"
            log.warning("%s model: not paired: %s; the engine's own layers serve", self.name, said)
        self.set_threshold(threshold)
        self.loaded = LoadedPairs(held, proof, threshold, self.loaded.source, reason, self.loads)
        runtime.changed()

    def _refuse_moved(self, held: Mapping[int, HeldLayer]) -> None:
        for number, layer in self.layers.items():
            captured = layer.layer.captured
            if captured is not None and captured != held[number].addresses:
                raise FsePatchError(
                    f"{self.name} model: layer {number}: the update has put weights at other addresses, and "
                    "captured CUDA graphs read the old ones; capture again, or start again"
                )

    def report(self) -> dict[str, Any]:
        """Return what this process really did, for `verify` and `status`."""
        calls, captured = self.counter.by_mode(), self.counter.captured_by_mode()
        told = {
            "engine": self.start.decision.engine,
            "role": self.name,
            "weight_layout": "paired",
            "built_layers": sorted(self.layers),
            "fused_layers": self.counter.layers("paired"),
            "calls_by_mode": calls,
            "captured_by_mode": captured,
            "slots_loaded": 0,
            "loads": self.loads,
        }
        return told if self.loaded is None else told | {"paired": self.loaded.to_dict()}


class PairedLoader:
    """The loads of one role: the engine's own, noted when they are done."""

    def __init__(self, role: PairedRole) -> None:
        self.role = role

    def load(self, original: Callable[[Any], Any], weights: Any) -> Any:
        """Run the engine's ``load_weights``."""
        result = original(weights)
        self.role.after_load()
        # On meta they are of an update under way, which says by itself when it ends.
        if not any(p.is_meta for layer in self.role.layers.values() for p in layer.parameters()):
            self.role.updated()
        return result


# The role under construction in this context, and all that live in this process.
PAIRING: ContextVar[PairedRole | None] = ContextVar("fse_patch_pairing", default=None)
PAIRED_ROLES: WeakSet[PairedRole] = WeakSet()
ROLE = "_fse_patch_paired"


@contextmanager
def pairing(role: PairedRole | None) -> Iterator[None]:
    """Build blocks of ``role``, or of none, in this context."""
    token = PAIRING.set(role)
    try:
        yield
    finally:
        PAIRING.reset(token)


def attach(model: Any, role: PairedRole) -> None:
    """Let ``model``, an entry class's instance, tell ``role`` of its loads from now on."""
    setattr(model, ROLE, role)
    setattr(model, LOADER, PairedLoader(role))
    PAIRED_ROLES.add(role)


def constructed() -> list[PairedRole]:
    """Return what lives in this process, the main model first."""
    return sorted(PAIRED_ROLES, key=lambda role: role.name != "main")
