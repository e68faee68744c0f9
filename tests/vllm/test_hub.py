"""A server that is given a name of a hub decides as by the folder, at its first start and later."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..hub_starts import FOR_TWO, Starts, arm
from ..running import Checkpoints

pytestmark = pytest.mark.one_release
PARALLEL, CORES = (
    {"tensor_parallel_size": 2},
    {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Starts:
    made = Checkpoints(tmp_path_factory.mktemp("checkpoints"), "vllm")
    return Starts(
        arm("vllm", 900, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}), made, tmp_path_factory.mktemp("starts")
    )


def test_cold_warm_offline_and_folder_are_one(starts: Starts) -> None:
    with starts.hub() as env:
        online = starts.by_name(env, 2)
    offline = starts.by_name({**env, "HF_HUB_OFFLINE": "1"})
    starts.check([*online, *offline], starts.by_folder())


@pytest.mark.long
def test_another_revision_is_another_decision(starts: Starts) -> None:
    branch = starts.other_branch()
    with starts.hub() as env:
        (other,) = starts.by_name(env, arguments={"revision": branch})
    # Routed and shared experts of that branch are stored in different ways.
    assert "logprobs" in other
    assert other["workers"][0]["roles"] == []


@pytest.mark.long
def test_two_processes_with_unequal_caches(starts: Starts, tmp_path: Path) -> None:
    starts = Starts(starts.run, starts.checkpoints, tmp_path, FOR_TWO)
    with starts.hub() as env:
        starts.check_unequal({**env, **CORES}, PARALLEL)
