"""What vLLM's own parser and configuration lead to for a launch command; no model is built."""

from __future__ import annotations

import json
from typing import Any

from .. import launches


def probe(folder: str, commands: str) -> list[dict[str, Any]]:
    """The reason of each command, "ok" where the model would be built fused; or the error of vLLM."""
    return [told(command, folder) for command in json.loads(commands)]


def told(command: str, folder: str) -> dict[str, Any]:
    try:
        with launches.given(command, folder) as words:
            return decided(words, folder)
    except (Exception, SystemExit) as error:
        return {"reason": f"{type(error).__name__}: {error}"}


def decided(words: list[str], folder: str) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:
        from vllm.entrypoints.openai.cli_args import make_arg_parser

    from fse_patch import settings
    from fse_patch.adapters.vllm.formats import format_here
    from fse_patch.adapters.vllm.start import settle_role

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    # As `vllm serve` does: the first word names the command, and the model behind it goes before --model.
    given = parser.parse_args(words[words.index("serve") + 1 :])
    if given.model_tag is not None:
        given.model = given.model_tag
    config = AsyncEngineArgs.from_cli_args(given).create_engine_config()
    settled = settle_role(
        "main",
        folder,
        config.model_config,
        config.load_config,
        config,
        lambda decision: format_here(decision, config),
        settings.load(),
    )
    return launches.decided(settled.decision.to_dict())
