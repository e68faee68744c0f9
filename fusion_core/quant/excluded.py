"""Methods whose weights are never fused: read only so far as to say which modules they quantise."""

from __future__ import annotations

from . import match
from .claims import PLAIN, Claim, Doubt, Resolver, Section, flag, mapping, names


def quark(section: Section) -> Resolver:
    """`exclude` as globs or "re:" regexes; `layer_quant_config` by glob, then `global_quant_config`."""
    excluded = match.mixed(names(section, "exclude"), match.globs)
    if mapping(section, "layer_type_quant_config"):
        raise Doubt("'layer_type_quant_config' is not known")
    default = _quark_claim(mapping(section, "global_quant_config"))
    layers = mapping(section, "layer_quant_config")
    single = [(match.globs([pattern]), _quark_claim(mapping(layers, pattern))) for pattern in layers]

    def resolve(name: str) -> Claim:
        if excluded(name):
            return PLAIN
        return next((claim for matches, claim in single if matches(name)), default)

    return resolve


def _quark_claim(section: Section) -> Claim:
    weight = section.get("weight")
    stages = weight if isinstance(weight, list) else [weight]
    kinds = [str(s.get("dtype")) for s in stages if isinstance(s, dict)]
    if not kinds:
        return PLAIN
    details = [str(s.get("qscheme")) for s in stages if isinstance(s, dict) and s.get("qscheme")]
    return Claim(f"quark-{'-'.join(kinds)}", details=tuple(details))


def mxfp4(section: Section) -> Resolver:
    """`modules_to_not_convert` on dotted boundaries."""
    ignored = match.globs(names(section, "modules_to_not_convert", "ignored_layers"))
    return lambda name: PLAIN if ignored(name) else Claim("mxfp4")


def bitsandbytes(section: Section) -> Resolver:
    """`llm_int8_skip_modules` on dotted boundaries."""
    skipped = match.dotted(names(section, "llm_int8_skip_modules"))
    four = flag(section, "load_in_4bit", False) or flag(section, "_load_in_4bit", False)
    claim = Claim("bitsandbytes-4bit" if four else "bitsandbytes-8bit")
    return lambda name: PLAIN if skipped(name) else claim
