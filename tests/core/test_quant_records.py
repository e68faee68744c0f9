"""Records of quantisation methods and formats: each is complete, and a broken one is noticed."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fse_patch.fusion_core import quant
from fse_patch.fusion_core.checkpoint.config import UNQUANTISED
from fse_patch.fusion_core.decision.policy_file import load_policy
from fse_patch.fusion_core.quant import awq, fbgemm_fp8, fp8, modelopt, mxfp4, quark
from fse_patch.fusion_core.quant.claims import PLAIN, Doubt, Section, all_plain
from fse_patch.fusion_core.quant.methods import FORMATS, LAYOUTS, METHODS, READABLE, TABLE_DTYPES
from fse_patch.fusion_core.quant.records import Format, Method

MODULES = [
    importlib.import_module(f"{quant.__name__}.{m.name}") for m in pkgutil.iter_modules(quant.__path__)
]


def ct(form: str, **weights: Any) -> dict[str, Any]:
    return {"format": form, "config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}


FLOAT = {"num_bits": 8, "type": "float"}
FOUR = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
# Of each method, sections that make every claim it can make, by format.
SECTIONS: dict[str, list[dict[str, Any]]] = {
    "none": [{}],
    "fp8": [{"weight_block_size": [128, 128]}, {}],
    "fbgemm-fp8": [{}],
    "compressed-tensors": [
        ct("float-quantized", **FLOAT, strategy="tensor"),
        ct("float-quantized", **FLOAT, strategy="channel"),
        ct("float-quantized", **FLOAT, strategy="block", block_structure=[128, 128]),
        ct("int-quantized", num_bits=8, type="int", strategy="channel"),
        ct("pack-quantized", **FOUR),
        ct("pack-quantized", **{**FOUR, "num_bits": 8}),
        ct("nvfp4-pack-quantized"),
        ct("mxfp4-pack-quantized"),
    ],
    "awq": [{"bits": 4}, {"bits": 8}],
    "gptq": [{"bits": 4}, {"bits": 8}],
    "auto-round": [
        {"bits": bits, "packing_format": f"auto_round:auto_{kind}"}
        for bits in (4, 8)
        for kind in ("gptq", "awq")
    ],
    "modelopt": [{"quant_algo": name} for name in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MXFP8")],
    "mxfp4": [{}],
    "quark": [{"global_quant_config": {"weight": {"dtype": "fp4"}}}],
    "bitsandbytes": [{"load_in_4bit": True}, {"load_in_8bit": True}],
}
SECTIONS["modelopt-fp4"] = SECTIONS["modelopt"]
UNKNOWN = {"a_key_of_tomorrow": 1}


def left_out(modules: Iterable[ModuleType | SimpleNamespace], methods: Iterable[Method]) -> list[str]:
    """Names of modules whose method the registry does not list."""
    listed = [id(method) for method in methods]
    return [m.__name__ for m in modules if hasattr(m, "METHOD") and id(m.METHOD) not in listed]


def faults(methods: Iterable[Method]) -> Iterator[str]:
    """What is wrong with the records themselves."""
    methods = list(methods)
    uses = Counter(name for method in methods for name in method.names)
    yield from (f"{name}: {n} methods have this name" for name, n in uses.items() if n > 1)
    first: dict[str, Format] = {}
    for method in methods:
        if not method.names or not method.engine_names:
            yield f"{method.names}: no name, or none that engines give it"
        if any(word != word.lower().replace("_", "-") for word in (*method.names, *method.engine_names)):
            yield f"{method.names}: not lower case with dashes"
        for form in method.formats:
            if first.setdefault(form.name, form) is not form:
                yield f"{form.name}: two records"
            if form.layout is None and (form.dequantise or form.table_dtype is not None):
                yield f"{form.name}: read, or tuned, and nobody knows how it is stored"
            if form.layout is not None and not form.layout:
                yield f"{form.name}: stores nothing"


def misread(method: Method, sections: Iterable[Section]) -> Iterator[str]:
    """Where claims of a parser are not those of its record, and where it reads over an unknown key."""
    claimed = set()
    for section in sections:
        claimed.add(method.parse(section)("model.layers.1.mlp.experts.3.up_proj").format)
        try:
            method.parse({**section, **UNKNOWN})
        except Doubt:
            continue
        # What is never fused is read as far as that needs; what is declared plain is seen in the headers.
        if method.names != (UNQUANTISED,) and any(form.layout for form in method.formats):
            yield f"{method.names}: reads over an unknown key"
    if claimed & FORMATS.keys() != {form.name for form in method.formats}:
        yield f"{method.names}: claims {sorted(claimed)}"


def fusible() -> set[str]:
    """Formats that the default policy may let pass."""
    return {name for rule in load_policy().rules if rule.fuse for name in rule.when.formats or ()}


def undecided(formats: Iterable[Format], may_fuse: set[str]) -> list[str]:
    """Formats that may fuse, and whose tuned tables nobody would look up."""
    return [form.name for form in formats if form.name in may_fuse and form.table_dtype is None]


def test_every_method_is_in_the_registry() -> None:
    assert len([m for m in MODULES if hasattr(m, "METHOD")]) == len(METHODS)
    assert left_out(MODULES, METHODS) == []
    new = SimpleNamespace(__name__="new", METHOD=replace(fp8.METHOD, names=("new",)))
    assert left_out([*MODULES, new], METHODS) == ["new"]
    assert left_out(MODULES, METHODS[1:]) == [METHODS[0].parse.__module__]


def test_records_are_complete() -> None:
    assert list(faults(METHODS)) == []


def with_formats(**changes: Any) -> Method:
    return replace(fp8.METHOD, names=("new",), formats=(replace(fp8.BLOCK, name="new", **changes),))


@pytest.mark.parametrize(
    "broken",
    [
        replace(fp8.METHOD, names=("new", "awq")),
        replace(fp8.METHOD, names=()),
        replace(fp8.METHOD, names=("New",)),
        replace(fp8.METHOD, names=("new_one",)),
        replace(fp8.METHOD, names=("new",), engine_names=frozenset()),
        replace(fp8.METHOD, names=("new",), engine_names=frozenset({"new_one"})),
        replace(fp8.METHOD, names=("new",), formats=(replace(fp8.BLOCK),)),
        with_formats(layout=None),
        with_formats(layout=None, dequantise=None),
        with_formats(layout={}),
    ],
)
def test_a_broken_record_is_noticed(broken: Method) -> None:
    assert len(list(faults([*METHODS, broken]))) == 1
    assert list(faults([*METHODS, with_formats()])) == []


def test_parsers_claim_what_their_records_say_and_doubt_unknown_keys() -> None:
    assert SECTIONS.keys() == {method.names[0] for method in METHODS}
    for method in METHODS:
        assert list(misread(method, SECTIONS[method.names[0]])) == []


def without_unknown(parse: Callable[[Section], Any]) -> Callable[[Section], Any]:
    return lambda section: parse({key: value for key, value in section.items() if key not in UNKNOWN})


@pytest.mark.parametrize(
    "broken",
    [
        replace(fp8.METHOD, formats=(fp8.BLOCK,)),
        replace(fp8.METHOD, formats=(fp8.BLOCK, fp8.TENSOR, fbgemm_fp8.CHANNEL)),
        replace(mxfp4.METHOD, formats=()),
        replace(quark.METHOD, formats=(mxfp4.MXFP4,)),
        replace(awq.METHOD, parse=lambda _: all_plain),
        replace(awq.METHOD, parse=without_unknown(awq.parse)),
        replace(modelopt.METHOD, parse=without_unknown(modelopt.parse)),
    ],
)
def test_a_parser_that_does_not_fit_its_record_is_noticed(broken: Method) -> None:
    assert list(misread(broken, SECTIONS[broken.names[0]]))


def test_every_format_that_may_fuse_says_what_its_tuned_tables_are_called() -> None:
    """A record decides it: the field has no default."""
    assert fusible() <= LAYOUTS.keys()
    assert {"fp8-block", "int4-gptq"} <= fusible()
    assert undecided(FORMATS.values(), fusible()) == []
    assert undecided([replace(fp8.BLOCK, table_dtype=None)], fusible()) == ["fp8-block"]
    assert TABLE_DTYPES.keys() <= LAYOUTS.keys()
    with pytest.raises(TypeError, match="table_dtype"):
        Format("new", layout=None, dequantise=None)  # type: ignore[call-arg]


def test_what_the_canary_reads_has_a_weight() -> None:
    assert PLAIN.format in READABLE
    assert [name for name in READABLE if "weight" not in LAYOUTS[name]] == []
    assert [name for name in ("int4-gptq", "int4-packed") if "weight" in LAYOUTS[name]] == [], "control"
