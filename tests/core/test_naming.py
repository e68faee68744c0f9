"""Tensor names: read on dotted boundaries; checked against a reader that only splits at dots."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fse_patch.fusion_core.checkpoint.families import FamilySpec, families
from fse_patch.fusion_core.checkpoint.naming import ExpertTensor, TensorNaming

MAIN_LAYERS = 10
PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
SUFFIXES = ("weight", "weight_scale_inv", "input_scale", "qweight", "g_idx", "weight_packed")
FAMILIES = {family.name: family for family in families()}
any_family = st.sampled_from(families())
NEAR_MISSES = (
    "shared_expert_gate", "shared_expert", "shared_experts", "xshared_expert", "experts", "expert", "2",
    "mlp", "xmlp", "mlp2", "gate", "layers", "model", "language_model", "mtp", "visual", "0", "3", "12", "-1",
    "weight", *PROJECTIONS, "gate_projx", "gate_proj2", "xgate_proj",
)  # fmt: skip


WORD = set(string.ascii_letters + string.digits + "_.")


def split_reader(family: FamilySpec, name: str) -> ExpertTensor | None:
    """The same question answered by components alone, with no regular expression."""
    prefixes = [(p, False) for p in family.layer_prefixes]
    if family.draft_prefix:
        prefixes.append((family.draft_prefix, True))
    for prefix, is_draft in prefixes:
        head = prefix.rstrip(".").split(".")
        parts = name.split(".")
        if parts[: len(head)] != head or len(parts) < len(head) + 4:
            continue
        layer, mlp, owner, *rest = parts[len(head) :]
        if not layer.isdigit() or mlp != "mlp" or "" in rest:
            continue
        expert: int | None
        if owner == family.shared_module:
            expert = None
        elif owner == "experts":
            expert = int(rest.pop(0)) if rest and rest[0].isdigit() else -1
        else:
            continue
        if not rest or rest[0] not in PROJECTIONS or (expert != -1 and len(rest) == 1):
            continue
        after_main = family.draft_after_main and int(layer) >= MAIN_LAYERS
        suffix = ".".join(rest[1:]) or "weight"
        if not set(suffix) <= WORD:
            continue
        role = "draft" if is_draft or after_main else "main"
        return ExpertTensor(role, int(layer), expert, rest[0], suffix)  # type: ignore[arg-type]
    return None


@given(
    any_family,
    st.booleans(),
    st.integers(0, 99),
    st.one_of(st.none(), st.just(-1), st.integers(0, 600)),
    st.sampled_from(PROJECTIONS),
    st.sampled_from(SUFFIXES),
)
def test_every_expert_name_is_read(
    family: FamilySpec, draft: bool, layer: int, expert: int | None, projection: str, suffix: str
) -> None:
    prefixes = family.layer_prefixes
    if draft and family.draft_prefix:
        prefixes = (family.draft_prefix,)
    owner = family.shared_module if expert is None else "experts" if expert < 0 else f"experts.{expert}"
    for prefix in prefixes:
        parsed = TensorNaming(family, MAIN_LAYERS).parse(f"{prefix}{layer}.mlp.{owner}.{projection}.{suffix}")
        assert parsed is not None
        assert (parsed.layer, parsed.expert, parsed.projection, parsed.suffix) == (
            layer, expert, projection, suffix,
        )  # fmt: skip
        assert parsed.is_shared == (expert is None)
        behind = family.draft_after_main and layer >= MAIN_LAYERS
        assert (parsed.role == "draft") == (prefix == family.draft_prefix or behind)


@example(FAMILIES["qwen2_moe"], ["shared_expert", "gate_proj"])
@given(any_family, st.lists(st.sampled_from(NEAR_MISSES), min_size=1, max_size=8))
def test_names_of_near_misses_agree_with_the_split_reader(family: FamilySpec, parts: list[str]) -> None:
    for name in (".".join(parts), family.layer_prefixes[0] + "1.mlp." + ".".join(parts)):
        assert TensorNaming(family, MAIN_LAYERS).parse(name) == split_reader(family, name)


@given(any_family, st.sampled_from(["x", "_", "2", "-"]), st.data())
def test_no_component_may_grow(family: FamilySpec, extra: str, data: st.DataObject) -> None:
    """Every module name counts as a whole: one more character at either end makes another module."""
    name = f"{family.layer_prefixes[0]}1.mlp.{family.shared_module}.down_proj.weight"
    naming = TensorNaming(family, MAIN_LAYERS)
    assert naming.parse(name) is not None
    parts = name.split(".")
    at = data.draw(st.sampled_from([n for n, p in enumerate(parts[:-1]) if not p.isdigit()]))
    for grown in (parts[at] + extra, extra + parts[at]):
        if grown == "down_proj_":
            continue
        changed = ".".join([*parts[:at], grown, *parts[at + 1 :]])
        assert naming.parse(changed) is None, changed


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.mlp.gate.weight",
        "xmodel.layers.0.mlp.shared_expert.up_proj.weight",
        "model.layers.0.mlp.shared_expert.up_proj.weight\n",
        "model.layers.0.mlp.shared_experts.up_proj.weight",
        "model.layers.٣.mlp.shared_expert.up_proj.weight",
        "model.layers.0.self_attn.shared_expert.up_proj.weight",
    ],
)
def test_what_is_no_expert_of_qwen(name: str) -> None:
    assert TensorNaming(FAMILIES["qwen2_moe"], MAIN_LAYERS).parse(name) is None
    assert FAMILIES["qwen2_moe"].shared_module == "shared_expert"


def test_bare_stacked_tensors_are_weights() -> None:
    parsed = TensorNaming(FAMILIES["qwen3_5_moe"], 2).parse(
        "model.language_model.layers.1.mlp.experts.gate_up_proj"
    )
    assert parsed == ExpertTensor("main", 1, -1, "gate_up_proj", "weight")
