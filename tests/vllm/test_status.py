"""`fse-patch status --url` of the real `vllm serve`, through vLLM's endpoint plugins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fse_patch.cli.status import ask
from fse_patch.errors import FsePatchError
from fse_patch.status_endpoint import StatusEndpoint

from ..paired import environment
from ..running import ROOT
from .engine import Checkpoints
from .test_serve import CASE, Server

pytestmark = [pytest.mark.long]


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    """Our entry point, whatever the installed package has, and this clone: a PYTHONPATH."""
    info = tmp_path / "fse_patch_status-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fse_patch_status\nVersion: 1\n")
    place = f"{StatusEndpoint.__module__}:{StatusEndpoint.__name__}"
    (info / "entry_points.txt").write_text(f"[vllm.endpoint_plugins]\nfse_patch = {place}\n")
    return os.pathsep.join([str(tmp_path), str(ROOT)])


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    started: list[Server] = []
    yield started
    for one in started:
        one.end()


def test_it_says_that_it_is_on(
    checkpoints: Checkpoints, tmp_path: Path, plugin: str, servers: list[Server]
) -> None:
    given = {"FSE_PATCH": "1", "VLLM_PLUGINS": "fse_patch", "PYTHONPATH": plugin}
    servers.append(Server(checkpoints.path(CASE.recipe), tmp_path, **given))
    assert servers[0].wait() is None, servers[0].output
    (rank,) = ask(f"http://127.0.0.1:{servers[0].port}", "", 30)
    assert (rank["rank"], rank["role"], rank["fused"], rank["layout"]) == (0, "main", True, "merged")
    assert (rank["layers"], rank["proof"]) == ([1, 2], "passed")
    assert rank["since"]


def test_paired_layers_say_so(
    checkpoints: Checkpoints, tmp_path: Path, plugin: str, servers: list[Server]
) -> None:
    given = {"FSE_PATCH": "1", "VLLM_PLUGINS": "fse_patch", "PYTHONPATH": plugin, **environment(4)}
    servers.append(Server(checkpoints.path(CASE.recipe), tmp_path, **given))
    assert servers[0].wait() is None, servers[0].output
    (rank,) = ask(f"http://127.0.0.1:{servers[0].port}", "", 30)
    assert (rank["fused"], rank["layout"], rank["proof"]) == (True, "paired", "passed")
    assert rank["modes"] == "paired up to 4, the engine's own beyond"


def test_the_control_a_server_without_the_page(
    checkpoints: Checkpoints, tmp_path: Path, plugin: str, servers: list[Server]
) -> None:
    servers.append(Server(checkpoints.path(CASE.recipe), tmp_path, FSE_PATCH="0", PYTHONPATH=plugin))
    assert servers[0].wait() is None, servers[0].output
    with pytest.raises(FsePatchError, match="VLLM_PLUGINS=fse_patch"):
        ask(f"http://127.0.0.1:{servers[0].port}", "", 30)
