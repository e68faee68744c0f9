"""The page of a running vLLM: a server that is not switched on says so, and its workers are not asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fse_patch.status_endpoint import METHOD, StatusEndpoint


class Client:
    def __init__(self) -> None:
        self.asked: list[str] = []

    async def collective_rpc(self, method: str) -> list[dict[str, Any]]:
        self.asked.append(method)
        return [{"rank": 0}]


@pytest.mark.parametrize(("value", "asked"), [("0", []), ("sglang", []), ("1", [METHOD]), ("vllm", [METHOD])])
def test_workers_are_asked_where_it_is_switched_on(
    monkeypatch: pytest.MonkeyPatch, value: str, asked: list[str]
) -> None:
    monkeypatch.setenv("FSE_PATCH", value)
    page, client = StatusEndpoint(), Client()
    asyncio.run(page.init_state(client, None, None))
    told = asyncio.run(page._ranks())
    assert client.asked == asked
    assert told == (
        [{"rank": 0}]
        if asked
        else [{"engine": "vllm", "on": False, "reason": "FSE_PATCH is not set in this server"}]
    )
