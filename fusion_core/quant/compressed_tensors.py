"""`quant_method` compressed-tensors: schemes in `config_groups`, by `targets`, less `ignore`."""

from __future__ import annotations

from . import match
from .claims import (
    PLAIN,
    Claim,
    Doubt,
    Resolver,
    Section,
    flag,
    mapping,
    names,
    refuse_unknown_keys,
    whole,
    word,
)

_KEYS = {
    "quant_method", "config_groups", "format", "ignore", "quantization_status", "kv_cache_scheme",
    "sparsity_config", "transform_config", "global_compression_ratio", "version",
}  # fmt: skip
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_SCHEME_KEYS = {
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder",
    "observer", "observer_kwargs", "scale_dtype", "zp_dtype",
}  # fmt: skip
# Every projection of an expert is one of these to the tools that write such files.
_CLASS = "Linear"
_INPUT_SCALE, _ZERO, _ORDER = (frozenset({s}) for s in ("input_scale", "weight_zero_point", "weight_g_idx"))


def compressed_tensors(section: Section) -> Resolver:
    """Names match whole, or by a "re:" regex from their start; "Linear" targets every projection."""
    refuse_unknown_keys(section, _KEYS)
    word(section, "quantization_status", "compressed", {"compressed", "frozen"})
    if mapping(section, "transform_config") or word(_sparsity(section), "format", "dense") != "dense":
        raise Doubt("transforms and sparsity are not known")
    groups = []
    default = word(section, "format", "")
    for label in mapping(section, "config_groups"):
        group = mapping(mapping(section, "config_groups"), label)
        refuse_unknown_keys(group, _GROUP_KEYS, f"config_groups.{label}.")
        targets = names(group, "targets")
        matches = match.mixed(targets, match.exact)
        groups.append((_CLASS in targets, matches, _claim(group, word(group, "format", default))))
    if not groups:
        raise Doubt("it has no 'config_groups'")
    ignored = match.mixed(names(section, "ignore"), match.exact)

    def resolve(name: str) -> Claim:
        if ignored(name):
            return PLAIN
        found = {claim for all_linear, matches, claim in groups if all_linear or matches(name)}
        if len(found) > 1:
            raise Doubt(f"two config groups claim {name}")
        return found.pop() if found else PLAIN

    return resolve


def _sparsity(section: Section) -> Section:
    sparsity = mapping(section, "sparsity_config")
    if sparsity and names(sparsity, "targets"):
        raise Doubt("sparsity is not known")
    return sparsity


def _claim(group: Section, form: str) -> Claim:
    weights, inputs = mapping(group, "weights"), mapping(group, "input_activations")
    for label, scheme in (("weights", weights), ("input_activations", inputs)):
        refuse_unknown_keys(scheme, _SCHEME_KEYS, f"{label}.")
    if mapping(group, "output_activations"):
        raise Doubt("quantised output activations are not known")
    if form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        return Claim(form.partition("-")[0])
    kind, bits = word(weights, "type", "int"), whole(weights, "num_bits")
    strategy = word(weights, "strategy", "")
    static = bool(inputs) and not _dynamic(inputs)
    symmetric = flag(weights, "symmetric", True)
    order = word(weights, "actorder", "", {"", "group", "weight", "dynamic", "static"})
    by_index = order in ("group", "dynamic")
    details = [_activations(inputs), "" if symmetric else "zero points", f"order {order}" if order else ""]
    if (kind, bits, form) == ("float", 8, "float-quantized") and symmetric and not order:
        rows, columns = _group(weights, strategy)
        name = {"tensor": "fp8-tensor", "channel": "fp8-channel", "block": "fp8-block"}.get(strategy)
    elif (kind, bits, form, strategy) == ("int", 8, "int-quantized", "channel") and symmetric and not order:
        rows, columns = 1, 0
        name = "int8-channel"
    elif kind == "int" and bits in (4, 8) and form == "pack-quantized" and strategy in ("group", "channel"):
        rows, columns = _group(weights, strategy)
        name = f"int{bits}-packed"
    else:
        name = None
    if name is None:
        raise Doubt(f"{kind} weights of {bits} bits by {strategy or 'no strategy'} in {form!r} are not known")
    return Claim(
        name,
        bits if name.endswith("-packed") else 0,
        (rows, columns),
        needs=(_INPUT_SCALE if static else frozenset())
        | (frozenset() if symmetric else _ZERO)
        | (_ORDER if by_index else frozenset()),
        lacks=(frozenset() if static else _INPUT_SCALE)
        | (_ZERO if symmetric else frozenset())
        | (frozenset() if by_index else _ORDER),
        inputs=_shared_scales(inputs),
        details=tuple(d for d in details if d),
    )


def _group(weights: Section, strategy: str) -> tuple[int, int]:
    if strategy == "block":
        block = weights.get("block_structure")
        if not isinstance(block, list) or len(block) != 2:
            raise Doubt(f"'block_structure' is {block!r}, no two sizes")
        sizes = {"rows": block[0], "columns": block[1]}
        return whole(sizes, "rows", low=1), whole(sizes, "columns", low=1)
    if strategy == "group":
        return 1, whole(weights, "group_size", low=1)
    return (1, 0) if strategy == "channel" else (0, 0)


def _dynamic(scheme: Section) -> bool:
    return False if scheme.get("dynamic") == "local" else flag(scheme, "dynamic", False)


def _shared_scales(inputs: Section) -> tuple[int, int] | None:
    """Tokens and columns of FP8 activations that share a scale; one for all by "tensor"."""
    if not inputs or word(inputs, "type", "int") != "float":
        return None
    tokens = 0 if word(inputs, "strategy", "") == "tensor" else 1
    return tokens, max(whole(inputs, "group_size", 0, low=-1), 0)


def _activations(inputs: Section) -> str:
    if not inputs:
        return ""
    how = "dynamic" if _dynamic(inputs) else "static"
    size = f" {inputs.get('group_size')}" if inputs.get("group_size") else ""
    kind, strategy = word(inputs, "type", "int"), word(inputs, "strategy", "")
    return f"{how} {kind}{whole(inputs, 'num_bits')} activations by {strategy}{size}"
