"""What a running vLLM answers under /fse_patch/status: one entry for each worker process.

vLLM loads it from its own group of entry points, vllm.endpoint_plugins, in releases that have one, and only
where VLLM_PLUGINS names fse_patch: it adds a page to the server.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from .errors import words
from .settings import load

PATH = "/fse_patch/status"
# The method of vLLM's workers that answers for a process, and the module of their base class.
METHOD = "fse_patch_status"
WORKERS = "vllm.v1.worker.worker_base"


def expose(status: Callable[[], Mapping[str, Any]]) -> bool:
    """Let the workers of this process answer; False where it has none."""
    base = getattr(sys.modules.get(WORKERS), "WorkerBase", None)
    if base is None:
        return False

    def answer(self: Any) -> dict[str, Any]:
        return {"rank": getattr(self, "rank", 0), **status()}

    setattr(base, METHOD, answer)
    return True


class StatusEndpoint:
    """A plugin as vLLM wants it: it adds a page, and gets the engine when there is one."""

    name = "fse_patch"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the page."""

        async def page() -> dict[str, Any]:
            return {"engine": "vllm", "ranks": await self._ranks()}

        app.add_api_route(PATH, page, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine's client."""
        self._client = engine_client

    _client: Any = None

    async def _ranks(self) -> list[Any]:
        if self._client is None:
            return []
        off = {"engine": "vllm", "on": False}
        if "vllm" not in load().engines:
            # Its workers would fail at our question, and write a traceback into the log.
            return [{**off, "reason": "FSE_PATCH is not set in this server"}]
        try:
            return list(await self._client.collective_rpc(METHOD))
        except Exception as error:  # no worker has a model of ours: nothing was decided there
            return [{**off, "reason": words(error)}]
