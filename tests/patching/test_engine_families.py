"""Classes and blocks of families in an engine, and the patches that exist once for each of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from fse_patch.adapters.patching import ledger
from fse_patch.adapters.patching.engine_families import BlockEntry, EntryClass, ReliedOn, block_of
from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.checkpoint.families import families
from fse_patch.patches import ENGINES, FOLDER

FIFTH = "made_moe"
MODELS = {"vllm": "vllm.model_executor.models", "sglang": "sglang.srt.models"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A copy of the data of this package."""
    return Path(shutil.copytree(FOLDER, tmp_path / "patches"))


def add(data: Path, engine: str, block: dict[str, Any], **entry: Any) -> Path:
    """Add a fifth family: a file, and nothing else."""
    made = yaml.safe_load((data / "families" / "glm4_moe.yaml").read_text())
    model = {"model": f"{MODELS[engine]}.made:MadeForCausalLM", "role": "main", **entry}
    made |= {
        "model_types": [FIFTH],
        "native": {},
        "engines": {engine: {"entry_classes": [model], "block": block}},
    }
    path = data / "families" / f"{FIFTH}.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def ids(data: Path, engine: str) -> dict[str, Any]:
    return {patch.id: patch for patch in ledger.load(engine, data).patches}


OWN = {
    "class": "made:MadeBlock",
    "upstream": "none: a test",
    "note": "A note.",
    "relies_on": {"forward": ["{class}.forward"], "native": ["{module}:asked"], "native-0.5.17": []},
}


def own(engine: str, **more: Any) -> dict[str, Any]:
    """A block with a class of its own."""
    return {**OWN, "class": f"{MODELS[engine]}.{OWN['class']}", **more}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_block_of_another_family_repeats_no_patch(data: Path, engine: str) -> None:
    before = ids(data, engine)
    add(data, engine, {"same_as": "glm4_moe"})
    after = ids(data, engine)
    new = after.keys() - before.keys()
    assert new
    assert all(name.endswith(".MadeForCausalLM") for name in new)
    for name, patch in before.items():
        assert patch == replace(after[name], families=after[name].families - {FIFTH})
    # A fault in the block that it borrows leaves this family alone too, and one elsewhere does not.
    assert {name for name, patch in after.items() if FIFTH in patch.families} - new == {
        name
        for name, patch in before.items()
        if "glm4_moe" in patch.families and not name.startswith("entry")
    }
    assert ledger.load(engine, data).roles[f"{MODELS[engine]}.made:MadeForCausalLM"] == "main"


@pytest.mark.parametrize(
    ("engine", "like", "names"),
    [
        ("vllm", None, {"factory", "factory-0.26", "block"}),
        ("sglang", None, {"experts"}),
        ("sglang", "qwen2_moe", {"experts", "block"}),
        ("sglang", "glm4_moe", {"experts", "block", "block-0.5.17"}),
    ],
)
def test_a_block_of_its_own_has_the_patches_of_its_kind(
    data: Path, engine: str, like: str | None, names: set[str]
) -> None:
    before = ids(data, engine)
    add(data, engine, own(engine, **({"like": like} if like else {})))
    after = ids(data, engine)
    new = {name for name in after.keys() - before.keys() if name.startswith("made-moe-")}
    assert new == {f"made-moe-{name}" for name in names}
    for name in new & {"made-moe-block"}:
        assert after[name].target == f"{MODELS[engine]}.made:MadeBlock.__init__"
        assert after[name].upstream == "none: a test"
    first = after[f"made-moe-{'factory' if engine == 'vllm' else 'experts'}"]
    assert first.why.endswith(". A note.")
    assert first.relies_on[0].reference == f"{MODELS[engine]}.made:MadeBlock.forward"
    assert first.module == f"{MODELS[engine]}.made"


def test_a_block_relies_on_something_in_some_releases(data: Path) -> None:
    limited = {"name": "{class}.route", "versions": ">=0.28"}
    add(data, "vllm", own("vllm", relies_on={"forward": ["{class}.forward", limited]}))
    book = ledger.load("vllm", data)
    for release, names in (("0.26.0", {"forward"}), ("0.28.0", {"forward", "route"})):
        sources = {s.reference for p in book.patches_for(Version(release)) for s in p.relies_on}
        assert {s.rpartition(".")[2] for s in sources if ".made:MadeBlock." in s} == names


def test_releases_of_a_class_narrow_its_patches(data: Path) -> None:
    add(data, "vllm", own("vllm", versions=">=0.30"), versions=">=0.31")
    after = ids(data, "vllm")
    for name, since in (("made-moe-block", "0.30"), ("entry-load.MadeForCausalLM", "0.31")):
        matching = [v for v in ("0.26.0", "0.28.0", "0.30.0", "0.32.0") if after[name].is_for(Version(v))]
        assert matching == [v for v in ("0.30.0", "0.32.0") if v >= since]


@pytest.mark.parametrize(
    ("block", "entry", "words"),
    [
        ({"same_as": "nobody"}, {}, "engines.vllm.block.same_as: 'nobody' has no block of its own here"),
        (
            {"same_as": "qwen3_5_moe"},
            {},
            "engines.vllm.block.same_as: 'qwen3_5_moe' has no block of its own here",
        ),
        (
            {"class": "a.b:C", "upstream": "none: x", "like": "nobody"},
            {},
            "engines.vllm.block.like: 'nobody' has no",
        ),
        ({}, {}, "engines.vllm.block: give one of class and same_as"),
        ({"same_as": "glm4_moe", "class": "a.b:C"}, {}, "engines.vllm.block: give one of class and same_as"),
        ({"same_as": "glm4_moe", "note": "x"}, {}, "engines.vllm.block: note: the block of glm4_moe has it"),
        ({"class": "a.b:C"}, {}, "engines.vllm.block: a block with a class needs upstream"),
        ({"class": "a.b", "upstream": "none: x"}, {}, "engines.vllm.block.class: 'a.b': write it as"),
        ({"same_as": "glm4_moe"}, {"role": "third"}, "engines.vllm.entry_classes.0.role: Input should be"),
        (
            {"same_as": "glm4_moe"},
            {"model": "made"},
            "engines.vllm.entry_classes.0.model: 'made': write it as",
        ),
        (
            {"same_as": "glm4_moe"},
            {"rol": "main"},
            "engines.vllm.entry_classes.0.rol: unknown key; did you mean ",
        ),
    ],
)
def test_a_malformed_part(data: Path, block: dict[str, Any], entry: dict[str, Any], words: str) -> None:
    path = add(data, "vllm", block, **entry)
    with pytest.raises(FsePatchError) as caught:
        ledger.load("vllm", data)
    assert str(caught.value).startswith(f"{path}: {words}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("spread]", "no-layer]", "relies_on: 'no-layer' is neither a group nor a reference"),
        ('"{block}.forward"', '"{block}.backward"', "relies_on: "),
        ("{note}", "{notes}", "use placeholders of block, class, module, upstream, note"),
        ('id: "{block}-block"', "id: load-model", "patch id 'load-model' occurs twice"),
    ],
)
def test_a_malformed_template(data: Path, old: str, new: str, words: str) -> None:
    path = data / "vllm.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(FsePatchError) as caught:
        ledger.load("vllm", data)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_family_has_a_block_to_measure(engine: str) -> None:
    blocks = {family.name: block_of(engine, family.name) for family in families()}
    assert all(block.reference.startswith(engine) for block in blocks.values())
    with pytest.raises(FsePatchError, match="llama: has no block in"):
        block_of(engine, "llama")


def test_a_family_passes_arguments_of_its_own_to_another_familys_block() -> None:
    blocks = {name: block_of("sglang", name) for name in ("qwen2_moe", "qwen3_next", "qwen3_5_moe")}
    assert len({block.reference for block in blocks.values()}) == 1
    assert {name: len(block.arguments) for name, block in blocks.items()} == {
        "qwen2_moe": 0, "qwen3_next": 2, "qwen3_5_moe": 1,
    }  # fmt: skip
    assert block_of("vllm", "qwen3_5_moe").from_config == {"vllm_config": "."}


def test_every_key_is_explained() -> None:
    text = (FOLDER / "families" / "README.md").read_text()
    kinds = (EntryClass, BlockEntry, ReliedOn)
    keys = [key.rstrip("_") for kind in kinds for key in kind.model_fields]
    assert [key for key in keys if f"`{key}`" not in text] == []
