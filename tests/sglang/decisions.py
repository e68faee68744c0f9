"""What SGLang's own configuration leads to for a checkpoint, in a process of its own; no model is built."""

from __future__ import annotations

import json
from contextlib import nullcontext
from inspect import signature
from typing import Any


def decided(folder: str, load_format: str = "auto", draft_format: str = "", **server: Any) -> dict[str, Any]:
    """The decision when the loader of ``load_format`` is about to build the model.

    Args:
        draft_format: a draft's own format, as in the scope of its load; the main model's is ``load_format``.
        server: arguments of the server.
    """
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.model_loader import get_model_loader
    from sglang.srt.model_loader.utils import get_model_architecture
    from sglang.srt.runtime_context import get_model, publish
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
    with get_model().override(load_format=draft_format) if draft_format else nullcontext():
        get_model_loader(load_config, config)
        start_of(get_model_architecture(config)[0], config, load_config, None)
    (decision,) = runtime.decisions()
    seen = str(getattr(load_config.load_format, "value", load_config.load_format))
    return {**decision, "load_format": seen}


def probe(cases: str) -> dict[str, dict[str, Any]]:
    """The decisions of cases, by name; each is the arguments of `decided`."""
    return {name: decided(**given) for name, given in json.loads(cases).items()}
