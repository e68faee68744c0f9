"""Overrides of a checkpoint's configuration, through each engine's own code; no engine is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fse_patch.adapters.running_config import config_differs
from fse_patch.fusion_core.checkpoint.families import Role
from fse_patch.fusion_core.decision.decide import decide_roles
from fse_patch.fusion_core.decision.outcome import Merged

Override = dict[str, Any]
# Folder, role and override: the configuration of the language model that the engine would run.
Configure = Callable[[str, Role, Override], Any]
OTHER: dict[type, Callable[[Any], Any]] = {
    bool: lambda value: not value,
    int: lambda value: 2 * value or 1,
    float: lambda value: 2 * value,
    str: lambda value: f"{value}_new",
    list: lambda value: [0],
}


def other(value: Any) -> Any:
    """Another value of the same type."""
    return OTHER[type(value)](value)


def of_vllm(folder: str, role: Role, override: Override) -> Any:
    """As `ModelConfig` and `SpeculativeConfig` of vLLM make it."""
    from vllm.config.speculative import SpeculativeConfig
    from vllm.transformers_utils.config import get_config, get_hf_text_config

    def overridden(config: Any) -> Any:
        get_hf_text_config(config).update(override)
        return SpeculativeConfig.hf_config_override(config) if role == "draft" else config

    return get_hf_text_config(get_config(folder, trust_remote_code=False, hf_overrides_fn=overridden))


def of_sglang(folder: str, role: Role, override: Override) -> Any:
    """As SGLang's own `ModelConfig` has it."""
    from sglang.srt.configs.model_config import ModelConfig

    nested = "text_config" in json.loads((Path(folder) / "config.json").read_text())
    given = json.dumps({"text_config": override} if nested else override)
    return ModelConfig(folder, model_override_args=given, is_draft_model=role == "draft").hf_text_config


CONFIGURE: dict[str, Configure] = {"vllm": of_vllm, "sglang": of_sglang}


def probe(engine: str, *folders: str) -> dict[str, dict[str, Any]]:
    """What is said of each checkpoint without overrides, by role, and with each one value changed."""
    configure, found = CONFIGURE[engine], {}
    for folder in folders:
        plain, changed = {}, {}
        for role, made in decide_roles(Path(folder), engine).items():
            if not isinstance(made, Merged) or made.config is None:
                plain[role] = [made.to_dict()["reason"]]
                continue
            plain[role] = said(made, configure(folder, role, {}))
            for key in made.config.values.keys() - without(made):
                override = {key: other(made.config.values[key])}
                changed[f"{role} {key}"] = said(made, configure(folder, role, override))
        found[Path(folder).name] = {"plain": plain, "changed": changed}
    return found


def without(made: Merged) -> set[str]:
    """Keys that a role does not rest on: the draft's layers for the main model, and the other way round."""
    family = made.family
    of_main = {"num_hidden_layers", "decoder_sparse_step", "mlp_only_layers", family.first_dense_key or ""}
    return {*family.draft_count_keys, *(of_main if made.role == "draft" else ())}


def said(made: Merged, config: Any) -> list[str]:
    """The refusals of a configuration, in one text each."""
    return [f"{reason.code}: {reason.detail}" for reason in config_differs(made, config)]


def check(found: dict[str, dict[str, Any]]) -> None:
    """Nothing is said of a checkpoint as it is, and each changed value is named."""
    for name, of in found.items():
        assert of["plain"] == {role: [] for role in of["plain"]}, name
        # The control: whatever the decision rests on is missed where it is another one.
        assert len(of["changed"]) >= 10, name
        for changed, reasons in of["changed"].items():
            key = changed.partition(" ")[2]
            assert [reason.partition(":")[0] for reason in reasons] == ["config.differs"], (name, changed)
            assert f"{key} is " in reasons[0] or f"'{key}' is " in reasons[0], (name, changed)
