"""The start of paired layers in vLLM: behind its worker's ``load_model``, before memory is profiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from packaging.version import Version

from .. import paired
from ..pair_proof import start_roles
from ..patching import guards, ledger
from .native import ENGINE


def worker_load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``load_model`` of the worker: what may run paired is proved when all of it is built."""

    @functools.wraps(original)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if roles := paired.constructed():
            start_roles(roles, Engine(self.vllm_config))
        return result

    return load


class Engine(paired.PairedEngine):
    """vLLM around its layers, in one worker."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config

    @contextmanager
    def context(self, num_tokens: int) -> Iterator[None]:
        """Make a forward context of its own."""
        from vllm.config import set_current_vllm_config
        from vllm.forward_context import set_forward_context

        with (
            torch.inference_mode(),
            set_current_vllm_config(self.vllm_config),
            set_forward_context(None, self.vllm_config, num_tokens=num_tokens),
        ):
            yield

    def group(self) -> Any:
        """Return vLLM's group of processes of tensor parallelism."""
        from vllm.distributed import parallel_state

        return parallel_state.get_tp_group()

    def release(self) -> str:
        """Return vLLM's release."""
        return Version(guards.engine_version(ledger.load(ENGINE))).public
