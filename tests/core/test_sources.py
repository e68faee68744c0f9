"""Files of a checkpoint's folder: what is there, and the words for what is not."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.checkpoint.sources import FolderSource, folder_source, read_json


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "holds a JSON list, not an object"),
        ('"{}"', "holds a JSON str, not an object"),
        ("null", "holds a JSON NoneType, not an object"),
        ("{", "not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"
              "; download it again"),
        (None, "cannot be read: No such file or directory"),
    ],
)  # fmt: skip
def test_what_is_no_json_object(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    for where, name in (("", str(path)), ("acme/tiny/a.json", "acme/tiny/a.json")):
        with pytest.raises(FsePatchError) as error:
            read_json(path, where)
        assert str(error.value) == f"{name}: {words}"
    with pytest.raises(FsePatchError) as error:
        FolderSource(tmp_path).read_json("a.json")
    assert str(error.value) == f"{tmp_path}/a.json: {words}"


def test_a_folder_lists_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    source = folder_source(str(tmp_path))
    assert folder_source(source) is source
    assert source.names() == {"a.json", "broken"}
    assert ("a.json" in source, "broken" in source, "b" in source) == (True, False, False)
    assert (source.local("a.json"), source.local("broken")) == (tmp_path / "a.json", None)
    assert source.fetch("b") == tmp_path / "b"
    assert (source.label, source.where("b")) == (str(tmp_path), f"{tmp_path}/b")
    assert source.read_json("a.json") == {}
    assert source.loaded() == source
    # What is listed is another process's to list again.
    (tmp_path / "b").touch()
    assert "b" not in source.names()
    assert "b" in source.loaded().names()
    assert "b" in pickle.loads(pickle.dumps(source)).names()


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FsePatchError) as error:
        FolderSource(tmp_path / "x").names()
    assert str(error.value) == f"{tmp_path}/x: no such folder; give the path of a downloaded checkpoint"
    missing = FolderSource(tmp_path).missing("a.safetensors", "the index names it")
    assert str(missing) == (
        f"{tmp_path}/a.safetensors: missing, but the index names it; download the whole checkpoint"
    )
