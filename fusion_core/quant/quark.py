"""`quant_method` quark: never fused, and read only so far as to say which modules it quantises."""

from __future__ import annotations

from . import match
from .claims import PLAIN, Claim, Doubt, Resolver, Section, mapping, names
from .records import Method


def parse(section: Section) -> Resolver:
    """Read `exclude` as globs or "re:" regexes; `layer_quant_config` by glob, then `global_quant_config`."""
    excluded = match.mixed(names(section, "exclude"), match.globs)
    if mapping(section, "layer_type_quant_config"):
        raise Doubt("'layer_type_quant_config' is not known")
    default = _claim(mapping(section, "global_quant_config"))
    layers = mapping(section, "layer_quant_config")
    single = [(match.globs([pattern]), _claim(mapping(layers, pattern))) for pattern in layers]

    def resolve(name: str) -> Claim:
        if excluded(name):
            return PLAIN
        return next((claim for matches, claim in single if matches(name)), default)

    return resolve


def _claim(section: Section) -> Claim:
    weight = section.get("weight")
    stages = weight if isinstance(weight, list) else [weight]
    kinds = [str(s.get("dtype")) for s in stages if isinstance(s, dict)]
    if not kinds:
        return PLAIN
    details = [str(s.get("qscheme")) for s in stages if isinstance(s, dict) and s.get("qscheme")]
    # In the config's own words, of which nobody has a list: no format, so no policy can let one pass.
    return Claim(f"quark-{'-'.join(kinds)}", details=tuple(details))


METHOD = Method(names=("quark",), parse=parse, formats=(), engine_names=frozenset({"quark"}))
