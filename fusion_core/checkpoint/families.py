"""Model families that can fuse: what differs between them stands in patches/families/, a file each.

A file has three parts: the family itself (`FamilySpec`), ``native`` (where a release of an engine fuses it by
itself), and ``engines`` (its classes in the engines), which is left to those who hook engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ...errors import FsePatchError
from ...patches import FOLDER, Engine, Platform
from ..data_file import Specifier, Strict, Text, check, parse

Scoring = Literal["softmax", "sigmoid"]
SharedWeight = Literal["sigmoid_gate", "constant"]
Role = Literal["main", "draft"]
# YAML has lists only.
Texts = Annotated[tuple[Text, ...], Field(strict=False)]
# An object in YAML; a family must be hashable.
ByEngine = Annotated[
    tuple[tuple[Engine, Texts], ...],
    BeforeValidator(lambda value: tuple(value.items()) if isinstance(value, dict) else value),
    Field(strict=False),
]


class _WithoutSharedExpert(Strict):
    """The file patches/no_shared_expert.yaml."""

    model_types: list[Text]


class FamilySpec(Strict):
    """Facts of one family, in the terms of its Hugging Face ``config.json`` and tensor names.

    Args:
        name: the family's short name in reports: the name of its file.
        model_types: ``model_type`` values of the top-level config that name this family.
        layer_prefixes: prefixes of decoder layers in checkpoints, longest first.
        mapped_prefixes: engine -> prefixes that it maps to layers as well.
        shared_module: the shared expert's module name below ``mlp``.
        shared_gate: module name below ``mlp`` of the gate whose sigmoid weighs the shared expert. None: the
            shared expert weighs 1.
        scoring: how router logits become expert scores.
        renormalize_default: ``norm_topk_prob`` where the config does not name it.
        grouped_routing: the family reads ``n_group``, ``topk_group`` and ``routed_scaling_factor``.
        scaling_factor_default: ``routed_scaling_factor`` where the config does not name it.
        num_experts_key, top_k_key: config keys of E and k.
        shared_size_key: config key of the shared expert's intermediate width; or
        num_shared_key: config key of its width in routed widths. One of the two.
        sparse_step: layers are sparse by ``decoder_sparse_step`` and ``mlp_only_layers``.
        every_layer_sparse: engines that build every layer sparse, whatever these say.
        first_dense_key: config key of the number of leading dense layers, if any.
        draft_prefix: prefix of the MTP draft's layers where it is another one.
        draft_count_keys: config keys of the number of draft layers, first one present wins.
        draft_after_main: the draft's layers follow the main ones under the same prefix.
    """

    name: Text
    model_types: Texts
    shared_module: Text
    scoring: Scoring
    num_experts_key: Text
    layer_prefixes: Texts = ("model.layers.",)
    mapped_prefixes: ByEngine = ()
    shared_gate: Text | None = None
    renormalize_default: bool = True
    grouped_routing: bool = False
    scaling_factor_default: Annotated[float, Field(gt=0)] = 1.0
    top_k_key: Text = "num_experts_per_tok"
    shared_size_key: Text | None = None
    num_shared_key: Text | None = None
    sparse_step: bool = False
    every_layer_sparse: Annotated[tuple[Engine, ...], Field(strict=False)] = ()
    first_dense_key: Text | None = None
    draft_prefix: Text | None = None
    draft_count_keys: Texts = ()
    draft_after_main: bool = False

    @model_validator(mode="after")
    def _one_width(self) -> FamilySpec:
        if (self.shared_size_key is None) == (self.num_shared_key is None):
            raise ValueError("give one of shared_size_key and num_shared_key")
        return self

    @property
    def shared_weight(self) -> SharedWeight:
        """Name the weight of the shared expert: the sigmoid of its gate, or constantly 1."""
        return "constant" if self.shared_gate is None else "sigmoid_gate"


class NativeFusion(Strict):
    """Releases of an engine that fuse a family by themselves.

    Args:
        platforms, versions: where they do.
        by_default: they do so without any switch.
        condition: what else it takes, in words.
        models: names of the family's classes that fuse; None: all of them.
        block: the engine's model file whose block is asked as well, if any.
        slots: how many slots it has room for; None: any number.
        wrong: why what is served then is not the model; None: it is.
    """

    platforms: list[Platform]
    versions: Specifier
    by_default: bool
    condition: Text
    models: list[Text] | None = None
    block: Text | None = None
    slots: Annotated[int, Field(ge=1)] | None = None
    wrong: Text | None = None


class _Beside(Strict):
    """Parts of a file beside the family itself."""

    native: dict[Engine, list[NativeFusion]] = Field(default_factory=dict)
    engines: dict[Engine, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class FamilyFile:
    """One file of patches/families/; ``engines`` is as written, by engine."""

    path: Path
    spec: FamilySpec
    native: Mapping[str, list[NativeFusion]]
    engines: Mapping[str, Any]


def read_families(folder: Path) -> tuple[FamilyFile, ...]:
    """Read every family file of ``folder``, in the order of their names.

    Raises:
        FsePatchError: a file is malformed, or two of them take the same ``model_type``.
    """
    files = tuple(map(_read, sorted(folder.glob("*.yaml"))))
    taken: dict[str, Path] = {}
    for file in files:
        for name in file.spec.model_types:
            if name in taken:
                raise FsePatchError(f"{file.path}: model_types: {name!r} is of {taken[name].name} already")
            taken[name] = file.path
    return files


def _read(path: Path) -> FamilyFile:
    data = parse(path)
    if not isinstance(data, dict):
        raise FsePatchError(f"{path}: holds no family; see the files beside it")
    if "name" in data:
        raise FsePatchError(f"{path}: name: leave it out; the file's own name is the family's")
    beside = check(path, _Beside, {key: data.pop(key) for key in _Beside.model_fields if key in data})
    spec = check(path, FamilySpec, {**data, "name": path.stem})
    native: dict[str, list[NativeFusion]] = {engine: rows for engine, rows in beside.native.items()}
    engines: dict[str, Any] = {engine: part for engine, part in beside.engines.items()}
    return FamilyFile(path, spec, native, engines)


@cache
def family_files() -> tuple[FamilyFile, ...]:
    """Read the files of this package."""
    return read_families(FOLDER / "families")


def families() -> tuple[FamilySpec, ...]:
    """List every family."""
    return tuple(file.spec for file in family_files())


@cache
def without_shared_expert() -> frozenset[str]:
    """Return the model types that are known to have routed experts alone."""
    path = FOLDER / "no_shared_expert.yaml"
    return frozenset(check(path, _WithoutSharedExpert, parse(path)).model_types)


def family_of(model_type: str) -> FamilySpec | None:
    """Return the family that a top-level ``model_type`` names, or None."""
    return next((spec for spec in families() if model_type in spec.model_types), None)
