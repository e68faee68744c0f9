"""The start of paired layers in SGLang: behind a model runner's ``load_model``, before its KV pool."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from packaging.version import Version

from .. import paired
from ..pair_proof import start_roles
from ..patching import guards, ledger
from . import native
from .native import ENGINE


def runner_load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``load_model`` of the model runner: what may run paired is proved when its model is there."""

    @functools.wraps(original)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if roles := paired.constructed():
            start_roles(roles, Engine())
        return result

    return load


class Engine(paired.PairedEngine):
    """SGLang around its layers, in one scheduler."""

    @contextmanager
    def context(self, num_tokens: int) -> Iterator[None]:
        """Run layers as while a graph is captured: their second stream counts then."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if native.platform() == "cuda":
                from sglang.srt.model_executor.runner import model_capture_mode

                stack.enter_context(model_capture_mode())
            yield

    def group(self) -> Any:
        """Return SGLang's group of processes of tensor parallelism."""
        from sglang.srt.distributed import parallel_state

        return parallel_state.get_tp_group()

    def release(self) -> str:
        """Return SGLang's release."""
        return Version(guards.engine_version(ledger.load(ENGINE))).public
