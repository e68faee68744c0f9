"""Families are files: each that lies there is read; a malformed one is a line that names file and field."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.checkpoint.families import FamilySpec, families, family_of, read_families
from fse_patch.patches import FOLDER

GLM = yaml.safe_load((FOLDER / "families" / "glm4_moe.yaml").read_text())
NATIVE = {"platforms": ["rocm"], "versions": ">=1", "by_default": True, "condition": "none"}


def write(folder: Path, stem: str = "made", **changes: object) -> Path:
    """A folder with one family, GLM-4 under another name, with changes."""
    data = {**GLM, "model_types": [stem], **changes}
    (folder / f"{stem}.yaml").write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
    return folder


def test_every_file_is_a_family() -> None:
    assert [family.name for family in families()] == sorted(
        p.stem for p in (FOLDER / "families").glob("*.yaml")
    )
    assert {family_of(name) for family in families() for name in family.model_types} == set(families())
    assert family_of("llama") is None


def test_a_new_file_is_a_new_family(tmp_path: Path) -> None:
    write(tmp_path, "first")
    write(tmp_path, "second", shared_gate="gate_of_it")
    first, second = (file.spec for file in read_families(tmp_path))
    assert (first.name, first.model_types, first.shared_weight) == ("first", ("first",), "constant")
    assert (second.name, second.shared_weight) == ("second", "sigmoid_gate")


def test_a_family_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        families()[0].scoring = "sigmoid"  # type: ignore[misc]
    assert len({*families(), *families()}) == len(families())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scoring": "relu"}, "scoring: Input should be 'softmax' or 'sigmoid'"),
        ({"scoring": None}, "scoring: Field required"),
        ({"model_types": "glm4_moe"}, "model_types: Input should be a valid tuple"),
        ({"model_types": [1]}, "model_types.0: Input should be a valid string"),
        ({"grouped_routing": "yes"}, "grouped_routing: Input should be a valid boolean"),
        ({"shared_modul": "x"}, "shared_modul: unknown key; did you mean "),
        ({"num_shared_key": None}, "give one of shared_size_key and num_shared_key"),
        ({"shared_size_key": "x"}, "give one of shared_size_key and num_shared_key"),
        ({"name": "other"}, "name: leave it out"),
        ({"native": {"vlm": []}}, "native.vlm.[key]: Input should be 'vllm' or 'sglang'"),
        ({"native": {"vllm": [{**NATIVE, "versions": "1"}]}}, "native.vllm.0.versions: Invalid specifier"),
        (
            {"native": {"vllm": [{**NATIVE, "platforms": ["tpu"]}]}},
            "native.vllm.0.platforms.0: Input should be",
        ),
        ({"native": {"vllm": [{**NATIVE, "rong": "x"}]}}, "native.vllm.0.rong: unknown key; did you mean "),
        ({"engines": {"vlm": {}}}, "engines.vlm.[key]: Input should be 'vllm' or 'sglang'"),
    ],
)
def test_a_malformed_family(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(FsePatchError) as caught:
        read_families(write(tmp_path, **changes))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'made.yaml'}: {words}")
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "[", "- 1", "\x00", "a: b: c"])
def test_what_is_no_family(tmp_path: Path, text: str) -> None:
    (tmp_path / "made.yaml").write_text(text)
    with pytest.raises(FsePatchError, match=r"made\.yaml") as caught:
        read_families(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_type_of_two_families(tmp_path: Path) -> None:
    write(tmp_path, "first")
    write(tmp_path, "second", model_types=["first"])
    with pytest.raises(FsePatchError, match=r"second\.yaml: model_types: 'first' is of first\.yaml already"):
        read_families(tmp_path)


def test_every_key_is_explained() -> None:
    text = (FOLDER / "families" / "README.md").read_text()
    assert [key for key in FamilySpec.model_fields if key != "name" and f"`{key}`" not in text] == []
