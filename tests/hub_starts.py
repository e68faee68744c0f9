"""Starts of the real engines by a name of a hub: cold, warm, offline, and with unequal caches."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fse_patch.lab import verify

from .core.hub import Hub
from .running import ROOT, Case, Checkpoints, RunArm, timeless

NAME = "acme/tiny"
RECIPE = "files_short_index"
# Sizes that two processes can share.
FOR_TWO = "names_shared_merged"
SHIM = ROOT / "tests" / "shims" / "unequal_caches"
# Files that no engine fetches, and that the look-up of a whole snapshot would miss.
EXTRA = ("README.md", "fig.png", "model.gguf", "model.onnx")


@dataclass
class Starts:
    """Starts in one engine.

    Args:
        run: an arm of it; jobs of one call are started one after the other.
        folder: for the hub and its caches.
    """

    run: RunArm
    checkpoints: Checkpoints
    folder: Path
    recipe: str = RECIPE

    def __post_init__(self) -> None:
        self.job = self.checkpoints.job(Case(self.recipe))
        self.repository = self.folder / "hub" / NAME
        shutil.copytree(self.job.checkpoint, self.repository)
        for name in EXTRA:
            (self.repository / name).write_bytes(b"x" * 64)

    @contextmanager
    def hub(self, **options: Any) -> Iterator[dict[str, str]]:
        """Serve the repository; yields the environment of an engine that takes models from there."""
        with Hub(self.folder / "hub", **options) as hub:
            hub.branches["mixed"] = "acme/mixed"
            home = str(self.folder / "home")
            yield {
                "HF_ENDPOINT": hub.url,
                "HF_HOME": home,
                "HF_HUB_OFFLINE": "0",
                "TRANSFORMERS_OFFLINE": "0",
            }

    def by_name(
        self, env: dict[str, str], count: int = 1, arguments: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Results of some starts by name, one after the other in one process."""
        job = replace(self.job, checkpoint=Path(NAME), engine_args=arguments or {})
        return self.run([job] * count, True, env)

    def other_branch(self) -> str:
        """Put a branch beside main, whose shared experts are stored in another dtype; returns its name."""
        mixed = self.folder / "hub" / "acme" / "mixed"
        if not mixed.exists():
            shutil.copytree(self.checkpoints.path("files_consolidated_mixed"), mixed)
            # Of the two sets of files, the one that is mixed.
            for path in mixed.glob("model*"):
                path.unlink()
            (mixed / "consolidated.safetensors").rename(mixed / "model.safetensors")
        return "mixed"

    def by_folder(self) -> dict[str, Any]:
        """Result of a start by the folder."""
        (result,) = self.run([self.job], True, {})
        return result

    def check(self, results: Sequence[dict[str, Any]], folder: dict[str, Any]) -> None:
        """All fused and proved by the headers, as by the folder, with the same values."""
        for result in (*results, folder):
            assert "logprobs" in result, f"{result.get('error')}\n{result.get('log', '')}"
            (role,) = result["workers"][0]["roles"]
            assert role["canary"]["state"] == "passed"
            assert timeless(result) == timeless(folder)
            assert result["logprobs"] == folder["logprobs"]

    def unequal(self, env: dict[str, str], arguments: dict[str, Any], alone: bool) -> dict[str, Any]:
        """Result of two processes, the second of which sees an empty cache while it decides.

        They stop where they decided differently, before anything is allocated; ``alone`` lets each decide
        for itself.
        """
        empty = self.folder / "empty"
        empty.mkdir(exist_ok=True)
        path = os.pathsep.join(filter(None, [str(SHIM), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        changed = {"FSE_PATCH_TEST_OTHER_CACHE": str(empty), "PYTHONPATH": path}
        if alone:
            changed["FSE_PATCH_TEST_DECIDE_ALONE"] = "1"
        (result,) = self.by_name({**env, **changed}, arguments=arguments)
        return result

    def check_unequal(self, env: dict[str, str], arguments: dict[str, Any]) -> None:
        """Both processes fuse the same layers. The control: each for itself, they decide differently."""
        result = self.unequal(env, arguments, alone=False)
        assert "logprobs" in result, f"{result.get('error')}\n{result.get('log', '')}"
        first, second = (worker["roles"] for worker in result["workers"])
        assert [role["built_layers"] for role in first] == [role["built_layers"] for role in second] != []
        control = self.unequal(env, arguments, alone=True)
        assert "the processes decided differently: Start, Unfused" in control.get("error", ""), control


def arm(engine: str, timeout: float, environment: dict[str, str]) -> RunArm:
    """The arm that users run, of one engine."""

    def run(jobs: list[verify.VerifyJob], fused: bool, env: dict[str, str]) -> list[dict[str, Any]]:
        return verify.run_arm(engine, jobs, fused, {**os.environ, **environment, **env}, timeout)

    return run
