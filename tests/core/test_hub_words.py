"""The one line for each answer of a hub, and for each file that is not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, errors

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.checkpoint.hub import HubSource, hub_error, locate

REPO = "acme/tiny"
CACHED = HubSource(REPO, "main", "0" * 40)
LISTED = HubSource(REPO, "main", "0" * 40, listed=frozenset({"a"}))
OFFLINE = (
    "{name}: not in the local cache, and {because}; HF_HUB_OFFLINE is set or the hub does not answer; "
    "get it by `hf download acme/tiny`"
)
UNKNOWN = "the hub does not know it, or it is private and HF_TOKEN is not set"
LOG_IN = "ask for access, and log in by `hf auth login` or HF_TOKEN"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def answered(kind: type[Exception], status: int) -> Exception:
    """An error of the client's, as a hub's answer leads to it."""
    error = kind.__new__(kind)
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (answered(errors.GatedRepoError, 404), f"the hub refuses it (404): {LOG_IN}"),
        (answered(errors.HfHubHTTPError, 401), f"the hub refuses it (401): {LOG_IN}"),
        (answered(errors.HfHubHTTPError, 403), f"the hub refuses it (403): {LOG_IN}"),
        (answered(errors.RevisionNotFoundError, 404), "the repository has no such revision"),
        (answered(errors.RepositoryNotFoundError, 410), UNKNOWN),
        (answered(errors.HfHubHTTPError, 404), UNKNOWN),
        (answered(errors.HfHubHTTPError, 402), "the hub answered with status 402"),
        (answered(errors.HfHubHTTPError, 503), "the hub answered with status 503"),
        (OSError("a\nb"), "the hub does not answer (OSError: a)"),
        (TimeoutError(), "the hub does not answer (TimeoutError)"),
    ],
)
def test_an_error_of_the_hub(error: Exception, words: str) -> None:
    assert str(hub_error("x", error)) == f"x: {words}"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (lambda: CACHED.fetch("a"), OFFLINE.format(name=f"{REPO}/a", because="it is needed")),
        (lambda: CACHED.headers(["a"]), OFFLINE.format(name=f"{REPO}/a", because="it is to be loaded")),
        (lambda: locate(REPO),
         f"{REPO}: not in the local cache at revision 'main', and HF_HUB_OFFLINE is set; get it by "
         f"`hf download {REPO}`"),
        (lambda: locate("a/b/c"),
         "a/b/c: no such folder, and no name of a repository; give a downloaded checkpoint or ORG/NAME"),
    ],
)  # fmt: skip
def test_what_is_not_there(asked: Any, words: str) -> None:
    with pytest.raises(FsePatchError) as error:
        asked()
    assert str(error.value) == words


def test_what_the_repository_lacks() -> None:
    assert str(LISTED.missing("b", "the index names it")) == f"{REPO}: has no b, but the index names it"
    assert (LISTED.label, LISTED.where("b")) == (REPO, f"{REPO}/b")


def test_every_file_of_the_hub_has_its_name_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: object, **__: object) -> None:
        raise OSError("no way")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", dead)
    monkeypatch.setattr("huggingface_hub.HfApi.parse_safetensors_file_metadata", dead)
    for asked in (lambda: LISTED.fetch("a"), lambda: LISTED.headers(["a"])):
        with pytest.raises(FsePatchError) as error:
            asked()
        assert str(error.value) == f"{REPO}/a: the hub does not answer (OSError: no way)"


def test_files_are_fetched_with_the_token_and_at_the_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, object] = {}

    def fetched(repository: str, name: str, **rest: object) -> str:
        asked.update({"repository": repository, "name": name, **rest})
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    source = replace(LISTED, token="secret")
    assert source.fetch("a") == tmp_path / "a"
    assert asked == {"repository": REPO, "name": "a", "revision": source.commit, "token": "secret"}
