"""What SGLang's own configuration leads to for a checkpoint, in a process of its own; no model is built."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any
from unittest.mock import patch

import torch


class Given:
    """Arguments of a server, with values of options that its release may lack."""

    def __init__(self, args: Any, options: dict[str, Any]) -> None:
        self.args, self.options = args, options

    def __getattr__(self, name: str) -> Any:
        return self.options[name] if name in self.options else getattr(self.args, name)


def old_gate(self: Any) -> None:
    """What classes of 0.5.17 have, by which GLM-4.5 is not fused natively, and the settings say so."""
    from sglang.srt.layers.moe import get_moe_a2a_backend
    from sglang.srt.runtime_context import get_context, get_exec, get_server_args

    if get_exec().moe.disable_shared_experts_fusion:
        return
    spread = get_server_args().ep_size > 1 or get_moe_a2a_backend().is_deepep()
    if spread or torch.cuda.get_device_capability("cuda") < (8, 0):
        get_context().override("determine_num_fused_shared_experts", disable_shared_experts_fusion=True)
        return
    self.num_fused_shared_experts = self.config.n_shared_experts


@contextmanager
def as_in_0_5_17(capability: list[int]) -> Iterator[None]:
    """GLM-4.5 on a GPU, in a release that asks its class for the number of fused experts."""
    from sglang.srt.models.glm4_moe import Glm4MoeForCausalLM

    from fse_patch.adapters.sglang import native

    gate = vars(Glm4MoeForCausalLM)[native.GATE]
    delattr(Glm4MoeForCausalLM, native.GATE)
    try:
        with ExitStack() as stack:
            stack.enter_context(patch.object(Glm4MoeForCausalLM, native.OLD_GATE, old_gate, create=True))
            stack.enter_context(patch.object(native, "platform", lambda: "cuda"))
            stack.enter_context(
                patch.object(torch.cuda, "get_device_capability", lambda *_: tuple(capability))
            )
            yield
    finally:
        setattr(Glm4MoeForCausalLM, native.GATE, gate)


def decided(
    folder: str,
    load_format: str = "auto",
    draft_format: str = "",
    capability: list[int] | None = None,
    options: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
    **server: Any,
) -> dict[str, Any]:
    """The decision when the loader of ``load_format`` is about to build the model.

    Args:
        draft_format: a draft's own format, as in the scope of its load; the main model's is ``load_format``.
        capability: of a GPU, for `as_in_0_5_17`; None: a CPU, and the release that is there.
        options: values that the server's arguments have when it is asked; a release may lack them.
        env: of the process, while it decides.
        server: arguments of the server.
    """
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.model_loader import get_model_loader
    from sglang.srt.model_loader.utils import get_model_architecture
    from sglang.srt.runtime_context import get_exec, get_model, publish
    from sglang.srt.server_args import ServerArgs

    from fse_patch import runtime
    from fse_patch.adapters.sglang.start import start_of

    args = ServerArgs(
        model_path=folder, dtype="float32", device="cpu", skip_tokenizer_init=True, load_format=load_format,
        attention_backend="torch_native", sampling_backend="pytorch", **server,
    )  # fmt: skip
    publish(args, role="scheduler")
    initialize_moe_config(*[args][: len(signature(initialize_moe_config).parameters)])
    config = ModelConfig.from_server_args(args)
    load_config = LoadConfig(load_format=draft_format or load_format)
    runtime.clear()
    with ExitStack() as stack:
        if draft_format:
            stack.enter_context(get_model().override(load_format=draft_format))
        if capability:
            stack.enter_context(as_in_0_5_17(capability))
        if options:
            given = Given(args, options)
            stack.enter_context(patch("sglang.srt.runtime_context.get_server_args", lambda: given))
        stack.enter_context(patch.dict(os.environ, env or {}))
        get_model_loader(load_config, config)
        start_of(get_model_architecture(config)[0], config, load_config, None)
        disabled = get_exec().moe.disable_shared_experts_fusion
    (decision,) = runtime.decisions()
    seen = str(getattr(load_config.load_format, "value", load_config.load_format))
    return {**decision, "load_format": seen, "disabled": disabled}


def probe(cases: str) -> dict[str, dict[str, Any]]:
    """The decisions of cases, by name; each is the arguments of `decided`."""
    return {name: decided(**given) for name, given in json.loads(cases).items()}
