"""Loading a role that was built fused: the shared tensors go to their slots, and are compared there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..errors import AuditError, FsePatchError
from ..fusion_core.weights.remap import Named, Remap, SlotTensor
from ..fusion_core.weights.samples import SlotSample
from .role import CONSTRUCTED, FusedRole
from .stop import stop_told

ROLE, LOADER = "_fse_patch", "_fse_patch_loader"


def attach(model: Any, fused_role: FusedRole) -> None:
    """Let ``model``, an entry class's instance, load and run as ``fused_role`` from now on."""
    setattr(model, ROLE, fused_role)
    setattr(model, LOADER, RoleLoader(fused_role))
    CONSTRUCTED.add(fused_role)


def load_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``load_weights`` of an entry class: on a model that was built fused, slots are filled here."""

    @functools.wraps(original)
    def load(self: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        loader: RoleLoader | None = getattr(self, LOADER, None)
        if loader is None:
            return original(self, weights, *args, **kwargs)
        return loader.load(lambda stream: original(self, stream, *args, **kwargs), weights)

    return load


class RoleLoader:
    """The loads of one role; the first is audited, the others are updates."""

    def __init__(self, fused_role: FusedRole) -> None:
        self.role = fused_role
        self._loading = False
        # Whether the first load met poisoned slots; otherwise the engine has filled and packed them.
        self._fresh: bool | None = None
        self._rows = KnownRows()

    def load(self, original: Callable[[Iterable[Named]], Any], weights: Iterable[Named]) -> Any:
        """Run the engine's ``load_weights``; where the slots are ours, on the routed tensors alone.

        Raises:
            AuditError: a shared slot was not written as decided; the model must not be served.
        """
        if self._loading:
            return original(weights)  # an entry class calls the one it inherits from
        self._loading = True
        try:
            with stop_told():
                load = self._fill if self.role.start.merged else self._watch
                return load(original, weights)
        finally:
            self._loading = False

    def _watch(self, original: Callable[[Iterable[Named]], Any], weights: Iterable[Named]) -> Any:
        """Compare the gates alone with what passes, where the engine fills its slots by itself."""
        result = original(self.role.gates.watch(weights))
        self.role.audit.loads += 1
        if self.role.loaded is not None:
            self.role.updated()  # a model that runs already
        return result

    def _fill(self, original: Callable[[Iterable[Named]], Any], weights: Iterable[Named]) -> Any:
        role = self.role
        if self._fresh is None:
            self._fresh = bool(role.poisoned)
        # Without a checkpoint at the start, the first load may be an update as well.
        update = role.audit.loads > 0 or role.is_collected
        sampled = not update and role.start.settings.verify != "off"
        sample = SlotSample(role.layout, role.name, role.start.naming, role.layers if sampled else ())
        role.audit.begin()
        result = original(self._routed_only(sample.tap(weights)))
        # Kernels may repack after the initial load; only that load's layout is known here.
        if update:
            role.audit.finish([], update)
            if role.loaded is not None and not role.is_collected:
                role.updated()  # a model that runs already
            return result
        role.audit.finish(role.poisoned, unrouted_layers=role.unrouted)
        # Before the engine processes what it loaded, while the checkpoint's rows and columns are there.
        for number, layer in role.layers.items():
            parameters = {name: p.data for name, p in layer.experts.named_parameters(recurse=False)}
            rank, parts = role.engine.share(layer.experts)
            rows = role.engine.rows(role.layout, layer.experts)
            comparison = sample.compare(number, parameters, rank, parts, rows)
            role.compared += comparison.compared
            role.not_compared |= comparison.not_compared
        self._rows.note(role.first_slot())
        return result

    def _routed_only(self, weights: Iterable[Named]) -> Iterator[Named]:
        role = self.role
        remap = Remap(role.layout, role.name, role.start.naming, role.layers)
        for item in remap(role.gates.watch(weights)):
            if isinstance(item, SlotTensor):
                self._write(item)
            else:
                yield item

    def _write(self, part: SlotTensor) -> None:
        role = self.role
        experts = role.layers[part.layer].experts
        parameter: Any = getattr(experts, part.parameter, None)
        if parameter is None:
            raise AuditError(f"layer {part.layer}: the fused experts have no parameter {part.parameter}")
        written_in_place = not parameter.is_meta and (role.audit.loads or not self._fresh)
        if written_in_place and not self._rows.are_as_loaded(role.first_slot()):
            raise FsePatchError(
                f"{role.name} model: load_weights alone cannot update the shared expert: the "
                "experts do not lie in memory as in a checkpoint; use the engine's own reload of weights"
            )
        given = replace(part, slot=role.engine.id_of(experts, part.slot))
        if not role.engine.take(parameter, given, f"layers.{part.layer}.mlp.experts.{part.parameter}"):
            raise AuditError(f"layer {part.layer}: the engine did not take {part.shard} of slot {part.slot}")
        role.audit.wrote(part)


class KnownRows:
    """A few rows of the first load: an engine that packs experts for its kernels has moved them."""

    def __init__(self) -> None:
        # By parameter; None once they were seen again, because how an engine packs does not change.
        self._rows: dict[str, torch.Tensor] | None = {}

    def note(self, rows: Mapping[str, torch.Tensor]) -> None:
        """Remember rows [1, ...] of any dtype, by parameter, that have just been loaded."""
        self._rows = {name: _bytes(row) for name, row in rows.items()}

    def are_as_loaded(self, rows: Mapping[str, torch.Tensor]) -> bool:
        """Return whether the same rows, as of `note`, are as they were loaded; no, where nothing was."""
        before = self._rows or {}
        if before and before.keys() == rows.keys():
            same = all(torch.equal(row, _bytes(rows[name])) for name, row in before.items())
            self._rows = None if same else before
        return self._rows is None


def _bytes(row: torch.Tensor) -> torch.Tensor:
    """Copy a row to the host's memory as bytes, by which any dtype compares."""
    return row.reshape(-1).view(torch.uint8).to("cpu", copy=True)
