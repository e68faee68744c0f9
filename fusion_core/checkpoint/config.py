"""MoE layers and their quantisation as config.json declares them, type checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from ...errors import FsePatchError
from .families import FamilySpec
from .sources import CONFIG_NAME, Source, folder_source

MODELOPT_CONFIG_NAME = "hf_quant_config.json"
UNQUANTISED = "none"
# Far above any model; keeps a typing error from filling the memory with layer numbers.
_MAX_LAYERS = 10_000
_MAX_COUNT = 1 << 24
# Keys of grouped routing, and what they are where a config has none.
UNGROUPED: Mapping[str, Any] = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}


@dataclass(frozen=True)
class MoeConfig:
    """Sizes and routing of a model's MoE layers.

    Args:
        num_routed: E. 0 where the model has no routed experts.
        top_k: k.
        hidden_size: H.
        moe_intermediate_size: I, width of a routed expert.
        shared_intermediate_size: width of the shared expert; 0 where there is none.
        main_layers, draft_layers: numbers of the sparse layers, as checkpoints count them.
        values: all of this as it was read, by key of the config; the default where a key is missing.
    """

    num_routed: int
    top_k: int
    hidden_size: int
    moe_intermediate_size: int
    shared_intermediate_size: int
    num_hidden_layers: int
    main_layers: tuple[int, ...]
    draft_layers: tuple[int, ...]
    renormalize: bool
    num_expert_group: int
    topk_group: int
    routed_scaling_factor: float
    hidden_act: str
    values: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_shared_slots(self) -> int | None:
        """Return the number of slots S = shared width / I; None where that is no whole number, or 0."""
        slots, rest = divmod(self.shared_intermediate_size, self.moe_intermediate_size)
        return slots if slots and not rest else None


@dataclass(frozen=True)
class QuantConfig:
    """Quantisation that a checkpoint declares.

    Args:
        method: ``quant_method``, lower case ("none" where nothing is declared).
        scheme: what the method calls its format: "block", "fp4", "nvfp4", "int4", "pack-quantized", ...
        block: ``weight_block_size`` as (out, in), or None.
        source: file and key that declared it.
        section: the declaration itself; what it says of single modules is read in `quant`.
    """

    method: str = UNQUANTISED
    scheme: str = ""
    block: tuple[int, int] | None = None
    source: str = ""
    section: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


class _Values:
    """Typed access to one JSON object; every error names file and key."""

    def __init__(self, values: Mapping[str, Any], path: str, section: str = "") -> None:
        self.values, self.path, self.section = values, path, section
        # What was asked for, as it was given out.
        self.read: dict[str, Any] = {}

    def fail(self, key: str, expected: str) -> FsePatchError:
        name = f"{self.section}{key}"
        if key not in self.values:
            return FsePatchError(f"{self.path}: has no '{name}'; expected {expected}")
        return FsePatchError(f"{self.path}: '{name}' is {self.values[key]!r}; expected {expected}")

    def _get(self, key: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        """Return a value that fits; the default, where there is one, for null and for a missing key."""
        value = self.values.get(key)
        if value is None and default is not None:
            value = default
        elif not fits(value):
            raise self.fail(key, expected)
        self.read[key] = value
        return value

    def integer(self, key: str, default: int | None = None, low: int = 0, high: int = _MAX_COUNT) -> int:
        # bool is an int to Python; JSON's true is no count.
        expected = f"a whole number from {low} to {high}"
        value: int = self._get(key, default, lambda v: type(v) is int and low <= v <= high, expected)
        return value

    def number(self, key: str, default: float) -> float:
        return float(self._get(key, default, _is_positive, "a number above 0"))

    def boolean(self, key: str, default: bool) -> bool:
        value: bool = self._get(key, default, lambda v: type(v) is bool, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value: str = self._get(key, default, lambda v: type(v) is str, "a string")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        return tuple(self._get(key, [], _is_integers, "a list of whole numbers"))

    def child(self, key: str) -> _Values | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return _Values(value, self.path, f"{self.section}{key}.")


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _is_integers(value: Any) -> bool:
    return type(value) is list and all(type(n) is int and n >= 0 for n in value)


class ConfigFile:
    """File config.json of one checkpoint.

    Raises:
        FsePatchError: the folder or its config.json is missing or malformed.
    """

    def __init__(self, checkpoint: Source | Path) -> None:
        self.source = source = folder_source(checkpoint)
        if CONFIG_NAME not in source:
            raise FsePatchError(f"{source.label}: has no {CONFIG_NAME}; give the folder of a checkpoint")
        self.path = source.where(CONFIG_NAME)
        self._top = _Values(source.read_json(CONFIG_NAME), self.path)
        # Multimodal checkpoints keep the language model's values in a nested object.
        self._text = self._top.child("text_config") or self._top
        self.model_type = self._top.text("model_type", "")

    def moe(self, family: FamilySpec) -> MoeConfig:
        """Read the MoE values by the keys that ``family`` names."""
        return _moe(family, _Values(self._text.values, self.path, self._text.section))

    def quantisations(self) -> tuple[QuantConfig, ...]:
        """List every declared quantisation, in the order in which engines look for them; at least "none".

        Engines read the first one they find, not always the same: all of them must say the same.
        """
        quants: list[QuantConfig] = []
        for values in (self._top, self._text) if self._text is not self._top else (self._top,):
            for key in ("quantization_config", "compression_config"):
                section = values.child(key)
                if section is not None:
                    default = "compressed-tensors" if key == "compression_config" else "unnamed"
                    quants.append(_quant_config(section, default, f"{CONFIG_NAME}: {section.section[:-1]}"))
        if MODELOPT_CONFIG_NAME in self.source:
            values = _Values(
                self.source.read_json(MODELOPT_CONFIG_NAME), self.source.where(MODELOPT_CONFIG_NAME)
            )
            section = values.child("quantization") or values
            quants.append(_quant_config(section, "modelopt", MODELOPT_CONFIG_NAME))
        # Engines take the weights from such a file, whatever config.json says.
        endings = {PurePath(name).suffix for name in self.source.names()}
        if ".gguf" in endings and ".safetensors" not in endings:
            quants.append(QuantConfig("gguf", source="*.gguf"))
        return tuple(quants) or (QuantConfig(),)


def moe_of(family: FamilySpec, values: Mapping[str, Any], source: str) -> MoeConfig:
    """Read the MoE values of ``values``, the language model's part of a config, as `ConfigFile.moe` does.

    Args:
        source: what holds them, for errors.

    Raises:
        FsePatchError: a value is missing, or is none that fits.
    """
    return _moe(family, _Values(values, source))


def _moe(family: FamilySpec, text: _Values) -> MoeConfig:
    layers = text.integer("num_hidden_layers", low=1, high=_MAX_LAYERS)
    routed = text.integer(family.num_experts_key)
    width = text.integer("moe_intermediate_size", low=1)
    top_k = text.integer(family.top_k_key, low=1)
    if routed and top_k > routed:
        raise text.fail(family.top_k_key, f"at most the {routed} experts of '{family.num_experts_key}'")
    # Other families ignore these keys, whatever a config carries along; it is only noted.
    grouped = text if family.grouped_routing else _Values({}, text.path)
    text.read |= {key: text.values.get(key) or neutral for key, neutral in UNGROUPED.items()}
    group = grouped.integer("n_group", default=1, low=1)
    topk_group = grouped.integer("topk_group", default=1, low=1)
    if routed % group:
        raise grouped.fail("n_group", f"a divisor of the {routed} experts")
    if topk_group > group:
        raise grouped.fail("topk_group", f"at most the {group} groups of 'n_group'")
    scale = grouped.number("routed_scaling_factor", family.scaling_factor_default)
    main, draft = _sparse_layers(family, text, layers)
    return MoeConfig(
        num_routed=routed,
        top_k=top_k,
        hidden_size=text.integer("hidden_size", low=1),
        moe_intermediate_size=width,
        shared_intermediate_size=_shared_width(family, text, width),
        num_hidden_layers=layers,
        main_layers=main,
        draft_layers=draft,
        renormalize=text.boolean("norm_topk_prob", family.renormalize_default),
        num_expert_group=group,
        topk_group=topk_group,
        routed_scaling_factor=scale,
        hidden_act=text.text("hidden_act", "silu"),
        values=text.read,
    )


def _shared_width(family: FamilySpec, text: _Values, width: int) -> int:
    if family.shared_size_key is not None:
        key, unit = family.shared_size_key, 1
    else:
        assert family.num_shared_key is not None, family.name
        key, unit = family.num_shared_key, width
    # null is how configs say "no shared expert"; a missing key says nothing.
    return text.integer(key, default=0 if key in text.values else None) * unit


def _sparse_layers(family: FamilySpec, text: _Values, layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    dense = set(text.integers("mlp_only_layers")) if family.sparse_step else set()
    step = text.integer("decoder_sparse_step", default=1, low=1) if family.sparse_step else 1
    first = text.integer(family.first_dense_key) if family.first_dense_key else 0

    def sparse(numbers: range) -> tuple[int, ...]:
        return tuple(n for n in numbers if n >= first and n not in dense and not (n + 1) % step)

    count_key = next((k for k in family.draft_count_keys if k in text.values), None)
    count = text.integer(count_key, default=0, high=_MAX_LAYERS) if count_key else 0
    start = layers if family.draft_after_main else 0
    return sparse(range(layers)), sparse(range(start, start + count))


def _quant_config(section: _Values, default_method: str, source: str) -> QuantConfig:
    # An empty object is how tools leave what they have taken out; engines look no further, as at any other.
    default = default_method if section.values else UNQUANTISED
    method = section.text("quant_method", default).lower().replace("_", "-")
    block = section.integers("weight_block_size")
    if block and (len(block) != 2 or not all(block)):
        raise section.fail("weight_block_size", "two whole numbers above 0")
    pair = (block[0], block[1]) if block else None
    return QuantConfig(method, _scheme(section, pair), pair, source, section.values)


def _scheme(section: _Values, block: tuple[int, int] | None) -> str:
    """Read the method's word for its format; "" where it has none that we know."""
    if block:
        return "block"
    # Formats are open-ended: an odd value is left to the policy's default, not called bad input.
    for key in ("format", "quant_algo"):
        if isinstance(word := section.values.get(key), str) and word:
            return word.lower()
    if type(bits := section.values.get("bits")) is int:
        return f"int{bits}"
    weight = section.values.get("global_quant_config")
    weight = weight.get("weight") if isinstance(weight, dict) else None
    # Two-stage schemes list one object per stage.
    weight = weight[0] if isinstance(weight, list) and weight else weight
    dtype = weight.get("dtype") if isinstance(weight, dict) else None
    return dtype.lower() if isinstance(dtype, str) else ""
