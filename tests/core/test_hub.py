"""Names of a hub: read without a download, from the cache as far as it is there, with one decision."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.checkpoint.hub import HubSource, is_repository, locate
from fse_patch.fusion_core.checkpoint.sources import Source
from fse_patch.fusion_core.checkpoint.tensors import CheckpointTensors
from fse_patch.fusion_core.checkpoint.weight_files import weight_files
from fse_patch.fusion_core.decision.decide import decide
from fse_patch.fusion_core.decision.outcome import Merged
from fse_patch.fusion_core.evidence.gather import read_evidence

from .checkpoints import Tensors, config_of, model_tensors, write_checkpoint
from .hub import Hub
from .outcomes import merged, stock

REPO = "acme/tiny"
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "hub" / REPO
    write_checkpoint(folder, config_of("qwen2_moe"), model_tensors("qwen2_moe"), shards=2, index=True)
    # Files that no engine fetches.
    for extra in ("README.md", "fig.png", "model.gguf", "model.onnx"):
        (folder / extra).write_bytes(b"x" * 100)
    return tmp_path / "hub"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a client that is online."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "cache"


def use(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Make ``hub`` the client's."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return hub


@pytest.fixture
def hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(root) as served:
        yield use(served, monkeypatch)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def download(
    patterns: list[str] | None = None, cache: str | None = None, revision: str | None = None
) -> None:
    """Fill the cache as an engine does it."""
    wanted = patterns or ["*.safetensors", "*.json"]
    huggingface_hub.snapshot_download(REPO, allow_patterns=wanted, cache_dir=cache, revision=revision)


def told(source: Source) -> str:
    """All that a decision says."""
    return json.dumps(decide(source, "vllm").to_dict(), sort_keys=True)


def complete(source: Source) -> bool:
    """What SGLang asks of a cached copy."""
    try:
        return bool(weight_files(source, "sglang").names)
    except FsePatchError:
        return False


def test_every_start_gives_one_decision(hub: Hub, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = told(locate(str(root / REPO)))
    cold = locate(REPO)
    assert told(cold) == folder
    assert cold.local("model-00001-of-00002.safetensors") is None, "a shard was downloaded"
    assert hub.asked[f"GET {SECOND}"] == 1
    download()
    assert told(locate(REPO)) == folder
    assert hub.asked[f"GET {SECOND}"] == 2, "a shard that is in the cache was asked for again"
    asked = sum(hub.asked.values())
    assert told(locate(REPO, suffices=complete)) == folder
    assert sum(hub.asked.values()) == asked, "SGLang does not ask the hub for a copy that is complete"
    go_offline(monkeypatch)
    assert told(locate(REPO)) == folder
    assert json.loads(folder)["fuse"] is True


def test_a_mixed_checkpoint_is_refused_by_name_as_in_a_folder(hub: Hub, root: Path) -> None:
    plain = model_tensors("qwen2_moe")
    mixed = {n: ("F16" if "shared_expert." in n else d, s) for n, (d, s) in plain.items()}
    write_checkpoint(root / REPO, config_of("qwen2_moe"), mixed, shards=2, index=True)
    assert stock(decide(locate(REPO), "vllm")).reason.code == "quant.mixed"


def test_only_headers_are_read(hub: Hub, root: Path) -> None:
    """Ten layers of 8 MiB in sparse files: a few hundred kilobytes are enough."""
    tensors = {f"{name}.{n}": ("BF16", (1024, 4096)) for n in range(10) for name in ("lm_head",)}
    write_checkpoint(
        root / REPO, config_of("qwen2_moe"), model_tensors("qwen2_moe") | tensors, shards=2, index=True
    )
    size = sum(path.stat().st_size for path in (root / REPO).glob("*.safetensors"))
    hub.bytes_sent = 0
    assert merged(decide(locate(REPO), "vllm"))
    assert hub.bytes_sent < 300_000 < size


def test_a_long_header_is_read_in_two_requests(hub: Hub, root: Path) -> None:
    tensors: Tensors = {f"{'long' * 20}.{n}": ("BF16", (1,)) for n in range(2000)}
    write_checkpoint(root / REPO, config_of("qwen2_moe"), model_tensors("qwen2_moe") | tensors)
    assert told(locate(REPO)) == told(locate(str(root / REPO)))


def test_an_incomplete_cache_is_filled_up_from_the_hub_or_named(
    hub: Hub, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(["*.json", "model-00001*"])
    assert told(locate(REPO, suffices=complete)) == told(locate(str(root / REPO)))
    assert hub.asked[f"GET {SECOND}"] == 1
    go_offline(monkeypatch)
    with pytest.raises(FsePatchError, match=f"{REPO}/{SECOND}: not in the local cache.*hf download {REPO}"):
        decide(locate(REPO), "vllm")


def test_nothing_in_the_cache_and_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)
    with pytest.raises(
        FsePatchError, match=f"{REPO}: not in the local cache.*HF_HUB_OFFLINE is set.*hf download"
    ):
        locate(REPO)
    assert not hub.asked


def test_the_revision_is_the_engines(hub: Hub, root: Path) -> None:
    plain = model_tensors("qwen2_moe")
    mixed = {n: ("F16" if "shared_expert." in n else d, s) for n, (d, s) in plain.items()}
    write_checkpoint(root / "acme/old", config_of("qwen2_moe"), mixed)
    hub.branches["old"] = "acme/old"
    assert merged(decide(locate(REPO), "vllm"))
    for revision in ("old", hub.commit("acme/old")):
        assert stock(decide(locate(REPO, revision), "vllm")).reason.code == "quant.mixed"
    with pytest.raises(FsePatchError, match=f"{REPO}: the repository has no such revision"):
        locate(REPO, "new")


def test_what_the_hub_refuses_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for status, words in (
        (401, "HF_TOKEN"),
        (403, "ask for access"),
        (500, "status 500"),
        (404, "does not know"),
    ):
        with Hub(root, refuses=status) as hub:
            use(hub, monkeypatch)
            with pytest.raises(FsePatchError, match=words) as caught:
                locate(REPO)
            assert "\n" not in str(caught.value)


def test_a_hub_that_dies_in_the_middle(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub(root) as hub:
        decide(locate(use(hub, monkeypatch) and REPO), "vllm")
        questions = sum(hub.asked.values())
    for answered in (0, 1, questions // 2, questions - 1):
        shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
        with Hub(root, dies_after=answered) as hub:
            use(hub, monkeypatch)
            with pytest.raises(FsePatchError, match="the hub does not answer") as caught:
                decide(locate(REPO), "vllm")
            assert "\n" not in str(caught.value)
    assert questions >= 4


def test_a_hub_that_does_not_answer_leaves_what_is_cached(
    hub: Hub, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download()
    with Hub(root, dies_after=0) as dead:
        use(dead, monkeypatch)
        assert told(locate(REPO)) == told(locate(str(root / REPO)))
    # The control: a repository that the hub says is not there is not taken from the cache.
    shutil.rmtree(root / REPO)
    use(hub, monkeypatch)
    with pytest.raises(FsePatchError, match="does not know it"):
        locate(REPO)


def test_weights_may_lie_in_a_cache_of_the_engines_own(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = str(tmp_path / "weights")
    download(["*.json"])
    download(["*.safetensors"], cache=weights)
    go_offline(monkeypatch)
    assert merged(decide(locate(REPO, download_dir=weights), "vllm"))
    # The control: in the default cache alone there are no weights.
    with pytest.raises(
        FsePatchError, match=f"{REPO}/model-00001-of-00002.safetensors: not in the local cache"
    ):
        decide(locate(REPO), "vllm")


def test_what_was_loaded_is_compared_with_what_was_decided_on(hub: Hub, root: Path) -> None:
    files = read_evidence(locate(REPO), "vllm").files
    download()
    loaded = CheckpointTensors(files.source.loaded(), files.names)
    assert loaded.digest == files.digest
    assert loaded.read("lm_head.weight").shape == (16, 64)
    # The repository moves between the decision and the download.
    tensors = {
        n: (("F32", s) if n == "lm_head.weight" else (d, s))
        for n, (d, s) in model_tensors("qwen2_moe").items()
    }
    write_checkpoint(root / REPO, config_of("qwen2_moe"), tensors, shards=2, index=True)
    download()
    assert CheckpointTensors(files.source.loaded(), files.names).digest != files.digest


def test_what_was_loaded_lies_in_the_first_cache_that_has_the_revision(
    hub: Hub, root: Path, tmp_path: Path
) -> None:
    weights = str(tmp_path / "weights")
    source = locate(REPO, download_dir=weights)
    before = hub.commit(REPO)
    (root / REPO / "README.md").write_text("moved on")
    download(cache=weights)
    after = hub.commit(REPO)
    loaded = source.loaded()
    assert isinstance(loaded, HubSource)
    assert (loaded.commit, loaded.listed) == (after, None)
    assert loaded.local(SECOND) is not None
    # Where no cache has it, it is what was decided on.
    elsewhere = locate(REPO, download_dir=str(tmp_path / "none")).loaded()
    assert isinstance(elsewhere, HubSource)
    assert elsewhere.commit == after != before
    shutil.rmtree(weights)
    still = source.loaded()
    assert isinstance(still, HubSource)
    assert still.commit == before


def test_a_source_travels_without_its_token(hub: Hub) -> None:
    source = locate(REPO, token="secret")
    assert isinstance(source, HubSource)
    sent = pickle.loads(pickle.dumps(source))
    assert sent == dataclasses.replace(source, token=None)
    assert b"secret" not in pickle.dumps(source)


@pytest.mark.parametrize("name", ["acme/tiny", "Qwen/Qwen3.5-35B-A3B", "a_b/c.d-e"])
def test_names_of_repositories(name: str) -> None:
    assert is_repository(name)


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "/a/b", "./b", "a/..", "a b/c", "~/x", "a/b/"])
def test_other_words_are_paths(name: str) -> None:
    assert not is_repository(name)
    with pytest.raises(FsePatchError, match="no such folder"):
        locate(name)


def test_sixty_shards_take_seconds(hub: Hub, root: Path) -> None:
    tensors = model_tensors("qwen2_moe") | {f"extra.{n}": ("BF16", (4,)) for n in range(400)}
    shutil.rmtree(root / REPO)
    write_checkpoint(root / REPO, config_of("qwen2_moe"), tensors, shards=60, index=True)
    begun = time.monotonic()
    assert isinstance(decide(locate(REPO), "vllm"), Merged)
    print(f"60 shards on loopback: {time.monotonic() - begun:.1f} s")
    shards = len(list((root / REPO).glob("*.safetensors")))
    # The last ones are empty, and the index does not name them.
    assert 50 < sum(n for asked, n in hub.asked.items() if asked.startswith("GET model-000")) <= shards
