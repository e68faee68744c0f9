"""Evidence of a checkpoint on its routed and shared experts: one frozen record a checkpoint.

Read from config.json and safetensors headers; judged elsewhere (policy.py, decide.py).
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.config import ConfigFile, MoeConfig, QuantConfig
from ..checkpoint.families import FamilySpec, Role, family_of
from ..checkpoint.headers import TensorHeader
from ..checkpoint.naming import MAX_DIGITS, Projection, TensorNaming
from ..checkpoint.sources import Source, folder_source
from ..checkpoint.weight_files import AUTO, CheckpointFiles, read_headers, weight_files
from ..quant.claims import PLAIN, Claim, Doubt, Resolver
from ..quant.methods import resolver_for
from ..reasons import Code, Reason
from .agreement import PARTS, Agreement, Part, agreement, cut_across
from .specs import ALL_EXPERTS, MlpSpec, SpecConflict, mlp_spec, size_conflict


@dataclass(frozen=True)
class LayerEvidence:
    """Storage of the experts of one sparse layer; a spec is None where ``finding`` says why.

    ``finding`` forbids fusing whatever the policy says. ``config`` says whether config.json tells the same
    story; None where there is a finding.
    """

    layer: int
    routed: MlpSpec | None
    shared: MlpSpec | None
    finding: Reason | None = None
    config: Agreement | None = None

    @property
    def stored_alike(self) -> bool | None:
        """Tell if routed and shared experts are alike in headers and config; None where nothing shows it."""
        if self.routed is None or self.shared is None:
            return False if self.finding is not None and self.finding.code == "quant.mixed" else None
        config = self.config
        if self.routed != self.shared or (config is not None and (config.sizes or config.state == "differs")):
            return False
        # Headers of packed integers show neither symmetry nor order: the config alone does.
        return (config.alike if config else None) if self.routed.packed else True


@dataclass(frozen=True)
class RoleEvidence:
    """Sparse layers of the main model or of its MTP draft.

    Args:
        moe_layers: sparse layers by config.json; for a draft that only the tensors show, by them.
        layers: evidence of each of them; empty where no headers were there to read.
        stored_layers: layers with an expert tensor in the checkpoint, whatever config.json says.
        finding: what of its tensors' names forbids fusing, or None.
    """

    role: Role
    moe_layers: tuple[int, ...]
    layers: tuple[LayerEvidence, ...] = ()
    stored_layers: tuple[int, ...] = ()
    finding: Reason | None = None

    @property
    def in_checkpoint(self) -> bool:
        """Return whether any expert tensor of this role is in the checkpoint."""
        return bool(self.stored_layers)

    @property
    def stored_alike(self) -> bool | None:
        """Tell if every layer stores its routed and shared experts alike; None where nothing shows it."""
        known = [layer.stored_alike for layer in self.layers]
        return False if False in known else None if None in known or not known else True


@dataclass(frozen=True)
class Evidence:
    """Facts that a decision rests on.

    Args:
        family, moe: None where ``model_type`` names no known family.
        quant: what engines read first; ``quants`` is all that is declared.
        headers: whether safetensors files will be loaded (False: config.json is all there is).
        files: those files.
        refusal: why these are not, or not surely, what is loaded; or None.
        roles: "main" always for a known family; "draft" where config or tensors show one.
    """

    model_type: str
    family: FamilySpec | None
    moe: MoeConfig | None
    quant: QuantConfig
    headers: bool
    roles: Mapping[Role, RoleEvidence]
    files: CheckpointFiles
    quants: tuple[QuantConfig, ...] = ()
    refusal: Reason | None = None


@dataclass
class _LayerTensors:
    """Expert tensors of one layer, the modules that hold them, and one more tensor of theirs, if any."""

    parts: dict[Part, dict[tuple[Projection, str], dict[int, TensorHeader]]] = field(default_factory=dict)
    modules: dict[Part, set[str]] = field(default_factory=lambda: {part: set() for part in PARTS})
    unknown: str = ""


_Layers = dict[tuple[Role, int], _LayerTensors]


def read_evidence(checkpoint: Source | Path, engine: str, load_format: str = AUTO) -> Evidence:
    """Read a checkpoint: config.json, and the headers of the safetensors files that an engine would load.

    Args:
        checkpoint: a folder, or where else the files are.

    Raises:
        FsePatchError: the checkpoint, its config.json or one of its files is missing or malformed.
    """
    with _collector_paused():
        return _read(folder_source(checkpoint), engine, load_format)


def _read(source: Source, engine: str, load_format: str) -> Evidence:
    config = ConfigFile(source)
    family = family_of(config.model_type)
    quants = config.quantisations()
    weights = weight_files(source, engine, load_format)
    headers = read_headers(source, weights)
    files = CheckpointFiles(source, headers.files, headers.digest)
    known = bool(headers.files)
    if family is None:
        return Evidence(config.model_type, None, None, quants[0], known, {}, files, quants, weights.refusal)
    moe = config.moe(family)
    layers, findings = _expert_tensors(headers.tensors, TensorNaming(family, moe.num_hidden_layers, engine))
    in_headers: dict[Role, tuple[int, ...]] = {"main": (), "draft": ()}
    for role, layer in sorted(layers):
        in_headers[role] += (layer,)
    resolve = _resolver(quants)
    roles: dict[Role, RoleEvidence] = {}
    for role, declared in (("main", moe.main_layers), ("draft", moe.draft_layers or in_headers["draft"])):
        if role == "draft" and not declared:
            continue
        evidence = tuple(
            _layer(n, layers.get((role, n), _LayerTensors()), moe, quants, resolve) for n in declared
        )
        roles[role] = RoleEvidence(
            role, declared, evidence if known else (), in_headers[role], findings.get(role)
        )
    return Evidence(config.model_type, family, moe, quants[0], known, roles, files, quants, weights.refusal)


def _resolver(quants: tuple[QuantConfig, ...]) -> Resolver:
    try:
        return resolver_for(quants)
    except Doubt as doubt:
        why = str(doubt)

    def in_doubt(_: str) -> Claim:
        raise Doubt(why)

    return in_doubt


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the garbage collector: hundreds of thousands of objects stay alive, it would only walk them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _expert_tensors(
    tensors: Mapping[str, TensorHeader], naming: TensorNaming
) -> tuple[_Layers, dict[Role, Reason]]:
    """File the experts' tensors by layer, and say of each role what names forbid to fuse it."""
    layers: _Layers = {}
    findings: dict[Role, Reason] = {}
    # Names of one layer's routed experts differ in the expert's number alone: one of them is parsed,
    # the others are filed beside it. Parsing all would take most of the time of a large checkpoint.
    siblings: dict[tuple[str, str], dict[int, TensorHeader]] = {}
    for name, header in tensors.items():
        head, _, tail = name.partition(".experts.")
        number, _, rest = tail.partition(".")
        routed = number.isascii() and number.isdecimal() and len(number) <= MAX_DIGITS
        experts = siblings.get((head, rest)) if routed else None
        if experts is not None:
            expert = int(number)
        else:
            parsed = naming.parse(name)
            if parsed is None:
                if (place := naming.layer_of_unknown(name)) is not None:
                    layers.setdefault(place, _LayerTensors()).unknown = name
                elif (role := naming.role_of_unplaced(name)) is not None:
                    why = f"{name!r} is of an expert, and under no name of a layer that is known"
                    findings.setdefault(role, Reason("names.unknown", why))
                continue
            expert = ALL_EXPERTS if parsed.expert is None else parsed.expert
            part: Part = "shared" if parsed.is_shared else "routed"
            layer = layers.setdefault((parsed.role, parsed.layer), _LayerTensors())
            experts = layer.parts.setdefault(part, defaultdict(dict))[parsed.projection, parsed.suffix]
            layer.modules[part].add(
                f"{head}.experts" if part == "routed" else _holder(name, parsed.projection)
            )
            if routed:
                siblings[head, rest] = experts
        if expert in experts:
            why = f"{name!r} is there under a second name as well; which one counts, nobody can say here"
            findings.setdefault(naming.role_of(name), Reason("names.unknown", why))
        experts[expert] = header
    return layers, findings


def _holder(name: str, projection: str) -> str:
    """Return the dotted name of the module that holds a projection."""
    return name.rpartition(f".{projection}")[0]


def _layer(
    number: int, tensors: _LayerTensors, moe: MoeConfig, quants: tuple[QuantConfig, ...], resolve: Resolver
) -> LayerEvidence:
    parts = tensors.parts

    def refuse(code: Code, detail: str) -> LayerEvidence:
        return LayerEvidence(number, None, None, Reason(code, f"layer {number}{detail}"))

    if tensors.unknown:
        return refuse("quant.unknown", f": {tensors.unknown!r} lies within the experts and is not known")
    for part in PARTS:
        if part not in parts:
            return refuse("quant.unknown", f": the checkpoint has no tensors of its {part} experts")
    specs: list[MlpSpec] = []
    for part in PARTS:
        experts = moe.num_routed if part == "routed" else None
        width = moe.moe_intermediate_size if part == "routed" else moe.shared_intermediate_size
        conflict = size_conflict(parts[part], experts, width, moe.hidden_size)
        if conflict is not None:
            return refuse("width.mismatch", f", {part}: {conflict}")
        try:
            specs.append(mlp_spec(parts[part], experts, quants[0].block))
        except SpecConflict as mixed:
            return refuse("quant.mixed", f", {part}: {mixed}")
    modules: dict[Part, str] = {}
    for part in PARTS:
        if len(tensors.modules[part]) != 1:
            return refuse("quant.unknown", f", {part}: tensors under {sorted(tensors.modules[part])}")
        (modules[part],) = tensors.modules[part]
    config = agreement(parts, modules, resolve, moe)
    for part, claim in zip(PARTS, (config.routed, config.shared), strict=True):
        merged = [experts for (p, _), experts in parts[part].items() if p == "gate_up_proj"]
        # One tensor of all routed experts is the engine's to take apart.
        cut_here = any(part == "shared" or ALL_EXPERTS not in experts for experts in merged)
        if cut_here and (claim is None or claim.gate_up != PLAIN):
            return refuse("quant.unknown", f", {part}: gate and up in one quantised tensor: not cut apart")
    split = config.shared if (moe.num_shared_slots or 1) > 1 else None
    if split is not None and (cut := cut_across(split, moe.moe_intermediate_size)):
        return refuse("width.block", f": {cut}")
    return LayerEvidence(number, specs[0], specs[1], None, config)
