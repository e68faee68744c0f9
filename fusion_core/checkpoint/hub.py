"""Checkpoints by the name of a repository: at one commit, from the local cache as far as it is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import FsePatchError
from .headers import FileHeader, read_file_header
from .sources import FolderSource, Source

_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
MAIN = "main"
# Headers that are read at once; each is one or two requests.
_THREADS = 16
_OFFLINE = "HF_HUB_OFFLINE"


@dataclass(frozen=True)
class HubSource(Source):
    """A repository at one commit.

    Args:
        repository: "ORG/NAME".
        revision: as the user gave it: a branch, a tag or a commit.
        commit: what it stands for.
        caches: folders of the hub's layout where files may lie already, the first one first.
        listed: the files at the top of the repository; None where the hub was not asked: what is cached.
        token: None for the user's own login.
    """

    repository: str
    revision: str
    commit: str
    caches: tuple[str | None, ...] = (None,)
    listed: frozenset[str] | None = None
    token: str | None = None

    is_remote = True

    @property
    def label(self) -> str:
        """Return the repository's name."""
        return self.repository

    @cached_property
    def _cached(self) -> frozenset[str]:
        return frozenset(
            path.name for folder in self._folders() for path in folder.iterdir() if path.exists()
        )

    def names(self) -> frozenset[str]:
        """List the files of the repository, or of the cache where the hub was not asked."""
        return self._cached if self.listed is None else self.listed

    def _folders(self) -> list[Path]:
        folders = (snapshot_folder(self.repository, self.commit, cache) for cache in self.caches)
        return [folder for folder in folders if folder is not None]

    def local(self, name: str) -> Path | None:
        """Return the file's place in a cache."""
        return next((folder / name for folder in self._folders() if (folder / name).is_file()), None)

    def fetch(self, name: str) -> Path:
        """Return the file's place in a cache, and download it there first if need be."""
        from huggingface_hub import hf_hub_download

        path = self.local(name)
        if path is not None:
            return path
        if self.listed is None:
            raise self.missing(name, "it is needed")
        try:
            return Path(hf_hub_download(self.repository, name, revision=self.commit, token=self.token))
        except Exception as error:
            raise hub_error(f"{self.repository}/{name}", error) from None

    def headers(self, names: Iterable[str]) -> Mapping[str, FileHeader]:
        """Read headers in a cache, and those of other files by range requests."""
        names = list(names)
        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(names, pool.map(self._header, names), strict=True))

    def _header(self, name: str) -> FileHeader:
        from huggingface_hub import HfApi

        path = self.local(name)
        if path is not None:
            return read_file_header(path)
        if self.listed is None:
            raise self.missing(name, "it is to be loaded")
        try:
            header = HfApi(token=self.token).parse_safetensors_file_metadata(
                self.repository, name, revision=self.commit
            )
        except Exception as error:
            raise hub_error(f"{self.repository}/{name}", error) from None
        entries: dict[str, Any] = {
            tensor: {
                "dtype": str(info.dtype),
                "shape": list(info.shape),
                "data_offsets": list(info.data_offsets),
            }
            for tensor, info in header.tensors.items()
        }
        return FileHeader(entries)

    def missing(self, name: str, because: str) -> FsePatchError:
        """Return the error for a file that is needed and not there."""
        if self.listed is not None:
            return FsePatchError(f"{self.repository}: has no {name}, but {because}")
        return FsePatchError(
            f"{self.repository}/{name}: not in the local cache, and {because}; {_OFFLINE} is set or the hub "
            f"does not answer; get it by `hf download {self.repository}`"
        )

    def loaded(self) -> Source:
        """Return what an engine has downloaded by now: the commit that its cache calls by the revision."""
        commits = (cached_commit(self.repository, self.revision, cache) for cache in self.caches)
        commit = next((commit for commit in commits if commit is not None), self.commit)
        return replace(self, commit=commit, listed=None)

    def __getstate__(self) -> dict[str, Any]:
        # A token stays in the process that has it; what is cached is another machine's business.
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "token": None}


def is_repository(model: str) -> bool:
    """Return whether a text has the form of a repository's name."""
    return _NAME.fullmatch(model) is not None and ".." not in model


def locate(
    model: str,
    revision: str | None = None,
    download_dir: str | None = None,
    token: str | None = None,
    suffices: Callable[[Source], bool] | None = None,
) -> Source:
    """Return where an engine takes a model from, at the commit that it will take.

    Args:
        model: a folder, or the name of a repository.
        download_dir: the engine's own cache of weights; what else it reads is in the hub's.
        suffices: tells whether a copy in the cache will be taken, whatever the hub says by now; None: never.

    Raises:
        FsePatchError: there is no such folder or repository, or it may not be read.
    """
    if Path(model).is_dir():
        return FolderSource(Path(model))
    if not is_repository(model):
        raise FsePatchError(
            f"{model}: no such folder, and no name of a repository; give a downloaded checkpoint or ORG/NAME"
        )
    from huggingface_hub import HfApi, constants

    caches = (download_dir, None) if download_dir else (None,)
    wanted = revision or MAIN
    commits = (cached_commit(model, wanted, cache) for cache in caches)
    commit = next((commit for commit in commits if commit is not None), None)
    cached = None if commit is None else HubSource(model, wanted, commit, caches)
    if constants.HF_HUB_OFFLINE:
        if cached is None:
            raise FsePatchError(
                f"{model}: not in the local cache at revision {wanted!r}, and {_OFFLINE} is set; get it by "
                f"`hf download {model}`"
            )
        return cached
    if cached is not None and suffices is not None and suffices(cached):
        return cached
    try:
        info = HfApi(token=token).model_info(model, revision=wanted)
    except Exception as error:
        if cached is not None and _is_unreachable(error):
            return cached
        raise hub_error(model, error) from None
    listed = frozenset(file.rfilename for file in info.siblings or () if "/" not in file.rfilename)
    return HubSource(model, wanted, str(info.sha), caches, listed, token)


def snapshot_folder(repository: str, commit: str, cache: str | None) -> Path | None:
    """Return the folder of a commit in a cache of the hub's layout, or None."""
    from huggingface_hub import constants

    name = constants.REPO_ID_SEPARATOR.join(("models", *repository.split("/")))
    folder = Path(cache or constants.HF_HUB_CACHE) / name / "snapshots" / commit
    return folder if folder.is_dir() else None


def cached_commit(repository: str, revision: str, cache: str | None) -> str | None:
    """Return the commit that a revision stands for in a cache, or None."""
    from huggingface_hub import constants

    if _COMMIT.fullmatch(revision):
        return revision if snapshot_folder(repository, revision, cache) else None
    name = constants.REPO_ID_SEPARATOR.join(("models", *repository.split("/")))
    try:
        commit = (Path(cache or constants.HF_HUB_CACHE) / name / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        return None
    return commit if snapshot_folder(repository, commit, cache) else None


def _is_unreachable(error: Exception) -> bool:
    """Return whether the hub did not answer at all; engines then take what is cached."""
    from huggingface_hub import errors

    answered = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
    if isinstance(error, answered):
        return False
    response = getattr(error, "response", None)
    return response is None or int(response.status_code) >= 500


def hub_error(what: str, error: Exception) -> FsePatchError:
    """Return one line for what a hub, or the way to it, answered."""
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    status = None if response is None else int(response.status_code)
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        why = f"the hub refuses it ({status}): ask for access, and log in by `hf auth login` or HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = "the repository has no such revision"
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        why = "the hub does not know it, or it is private and HF_TOKEN is not set"
    elif status is not None:
        why = f"the hub answered with status {status}"
    else:
        words = str(error).split("\n")[0]
        why = f"the hub does not answer ({type(error).__name__}{f': {words}' if words else ''})"
    return FsePatchError(f"{what}: {why}")
