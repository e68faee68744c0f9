"""What a checkpoint shows about its routed and shared experts: one frozen record a checkpoint.

Read from config.json and safetensors headers; judged elsewhere (policy.py, decide.py).
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import FsePatchError
from .config import ConfigFile, MoeConfig, QuantConfig
from .families import FamilySpec, Role, family_of
from .headers import TensorHeader, read_headers
from .naming import Projection, TensorNaming
from .reasons import Reason
from .specs import ALL_EXPERTS, MlpSpec, SpecConflict, Tensors, mlp_spec, size_conflict

Part = Literal["routed", "shared"]
_PARTS: tuple[Part, Part] = ("routed", "shared")


@dataclass(frozen=True)
class Finding:
    """Something about one layer's tensors that forbids fusing whatever the policy says."""

    reason: Reason
    detail: str


@dataclass(frozen=True)
class LayerEvidence:
    """How one sparse layer stores its experts; a spec is None where ``finding`` says why."""

    layer: int
    routed: MlpSpec | None
    shared: MlpSpec | None
    finding: Finding | None = None


@dataclass(frozen=True)
class RoleEvidence:
    """The sparse layers of the main model or of its MTP draft.

    Args:
        moe_layers: sparse layers by config.json; for a draft that only the tensors show, by them.
        layers: evidence of each of them; empty where no headers were there to read.
        in_checkpoint: whether any expert tensor of this role is in the checkpoint.
    """

    role: Role
    moe_layers: tuple[int, ...]
    layers: tuple[LayerEvidence, ...] = ()
    in_checkpoint: bool = False


@dataclass(frozen=True)
class Evidence:
    """Everything that a decision rests on.

    Args:
        family, moe: None where ``model_type`` names no known family.
        headers: whether the folder held safetensors files (False: config.json only).
        roles: "main" always for a known family; "draft" where config or tensors show one.
    """

    model_type: str
    family: FamilySpec | None
    moe: MoeConfig | None
    quant: QuantConfig
    headers: bool
    roles: Mapping[Role, RoleEvidence]


# (role, layer) -> part -> (projection, suffix) -> expert -> header
_Layers = dict[tuple[Role, int], dict[Part, dict[tuple[Projection, str], dict[int, TensorHeader]]]]


def read_evidence(checkpoint: Path) -> Evidence:
    """Read a checkpoint folder: config.json, and the headers of its safetensors files if it has any.

    Raises:
        FsePatchError: the folder, its config.json or one of its shards is missing or malformed.
    """
    with _collector_paused():
        return _read(checkpoint)


def _read(checkpoint: Path) -> Evidence:
    config = ConfigFile(checkpoint)
    family = family_of(config.model_type)
    quant = config.quantisation()
    headers = read_headers(checkpoint)
    if family is None:
        return Evidence(config.model_type, None, None, quant, bool(headers.files), {})
    moe = config.moe(family)
    layers = _expert_tensors(headers.tensors, TensorNaming(family, moe.num_hidden_layers))
    in_headers: dict[Role, tuple[int, ...]] = {"main": (), "draft": ()}
    for role, layer in sorted(layers):
        in_headers[role] += (layer,)
    roles: dict[Role, RoleEvidence] = {}
    for role, declared in (("main", moe.main_layers), ("draft", moe.draft_layers or in_headers["draft"])):
        if role == "draft" and not declared:
            continue
        evidence = tuple(_layer(n, layers.get((role, n), {}), moe, quant) for n in declared)
        roles[role] = RoleEvidence(role, declared, evidence if headers.files else (), bool(in_headers[role]))
    return Evidence(config.model_type, family, moe, quant, bool(headers.files), roles)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Hundreds of thousands of objects that all stay alive: the collector would only walk them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _expert_tensors(tensors: Mapping[str, TensorHeader], naming: TensorNaming) -> _Layers:
    layers: _Layers = {}
    # Names of one layer's routed experts differ in the expert's number alone: one of them is parsed,
    # the others are filed beside it. Parsing all would take most of the time of a large checkpoint.
    siblings: dict[tuple[str, str], dict[int, TensorHeader]] = {}
    for name, header in tensors.items():
        head, _, tail = name.partition(".experts.")
        number, _, rest = tail.partition(".")
        routed = number.isascii() and number.isdecimal()
        experts = siblings.get((head, rest)) if routed else None
        if experts is not None:
            expert = int(number)
        else:
            parsed = naming.parse(name)
            if parsed is None:
                continue
            expert = ALL_EXPERTS if parsed.expert is None else parsed.expert
            part: Part = "shared" if parsed.is_shared else "routed"
            parts = layers.setdefault((parsed.role, parsed.layer), {})
            experts = parts.setdefault(part, defaultdict(dict))[parsed.projection, parsed.suffix]
            if routed:
                siblings[head, rest] = experts
        if expert in experts:
            # Two prefixes in one checkpoint: which of the two an engine loads, nobody can say here.
            raise FsePatchError(f"tensor {name!r} is there under a second name as well; keep one of the two")
        experts[expert] = header
    return layers


def _layer(number: int, parts: Mapping[Part, Tensors], moe: MoeConfig, quant: QuantConfig) -> LayerEvidence:
    for part in _PARTS:
        if part not in parts:
            detail = f"layer {number}: the checkpoint has no tensors of its {part} experts"
            return LayerEvidence(number, None, None, Finding("quant.unknown", detail))
    specs: list[MlpSpec] = []
    for part in _PARTS:
        experts = moe.num_routed if part == "routed" else None
        width = moe.moe_intermediate_size if part == "routed" else moe.shared_intermediate_size
        conflict = size_conflict(parts[part], experts, width, moe.hidden_size)
        if conflict is not None:
            detail = f"layer {number}, {part}: {conflict}"
            return LayerEvidence(number, None, None, Finding("width.mismatch", detail))
        try:
            specs.append(mlp_spec(parts[part], experts, quant.block))
        except SpecConflict as mixed:
            detail = f"layer {number}, {part}: {mixed}"
            return LayerEvidence(number, None, None, Finding("quant.mixed", detail))
    return LayerEvidence(number, specs[0], specs[1])
