"""`fse-patch status --url` of the real SGLang server, through its server info."""

from __future__ import annotations

from pathlib import Path

import pytest

from fse_patch.cli.status import ask

from ..paired import environment
from .conftest import Runs
from .test_launch import SERVED, arguments, server

pytestmark = [pytest.mark.long]


@pytest.mark.parametrize(("flags", "reason"), [([], None), (["--disable-shared-experts-fusion"], "disabled")])
def test_it_says_whether_it_is_on(runs: Runs, tmp_path: Path, flags: list[str], reason: str | None) -> None:
    args = [*arguments(runs.checkpoints.path(SERVED[0].recipe)), *flags]
    with server(args, tmp_path / "log", SGLANG_PLUGINS="none") as (port, _):
        (rank,) = ask(f"http://127.0.0.1:{port}", "", 30)
    assert (rank["engine"], rank["role"], rank["fused"], rank["reason"]) == (
        "sglang",
        "main",
        reason is None,
        reason,
    )
    if reason is None:
        assert (rank["layout"], rank["proof"]) == ("merged", "passed")
        assert len(rank["layers"]) == 2


def test_paired_layers_say_so(runs: Runs, tmp_path: Path) -> None:
    args = arguments(runs.checkpoints.path(SERVED[0].recipe))
    with server(args, tmp_path / "log", SGLANG_PLUGINS="none", **environment(4)) as (port, _):
        (rank,) = ask(f"http://127.0.0.1:{port}", "", 30)
    assert (rank["fused"], rank["layout"], rank["proof"]) == (True, "paired", "passed")
    assert rank["modes"] == "paired up to 4, the engine's own beyond"
