"""What SGLang's own parser and configuration lead to for a launch command; no model is built."""

from __future__ import annotations

import json
from inspect import signature
from typing import Any

from .. import launches

# What this package's tests need on a CPU, and `plan` knows by its --device.
ON_A_CPU = [
    "--device=cpu",
    "--attention-backend=torch_native",
    "--sampling-backend=pytorch",
    "--skip-tokenizer-init",
]


def probe(folder: str, commands: str) -> list[dict[str, Any]]:
    """The reason of each command, "ok" where the model would be built fused."""
    return [told(command, folder) for command in json.loads(commands)]


def told(command: str, folder: str) -> dict[str, Any]:
    try:
        with launches.given(command, folder) as words:
            return decided(words)
    except (Exception, SystemExit) as error:
        return {"reason": f"{type(error).__name__}: {error}"}


def decided(words: list[str]) -> dict[str, Any]:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.model_loader import get_model_loader
    from sglang.srt.model_loader.utils import get_model_architecture
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import prepare_server_args

    from fse_patch import runtime
    from fse_patch.adapters.sglang.start import start_of

    args = prepare_server_args([*words[words.index("sglang.launch_server") + 1 :], *ON_A_CPU])
    publish(args, role="scheduler")
    initialize_moe_config(*[args][: len(signature(initialize_moe_config).parameters)])
    config = ModelConfig.from_server_args(args)
    load_config = LoadConfig(load_format=args.load_format)
    runtime.clear()
    get_model_loader(load_config, config)
    start_of(get_model_architecture(config)[0], config, load_config, None)
    (decision,) = runtime.decisions()
    return launches.decided(decision)
