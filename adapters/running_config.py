"""The configuration that an engine runs, beside the one that was decided on."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..errors import FsePatchError
from ..fusion_core.checkpoint.config import UNGROUPED, MoeConfig, moe_of
from ..fusion_core.checkpoint.families import Role, family_of
from ..fusion_core.decision.outcome import Merged, Paired
from ..fusion_core.reasons import Reason

ADVICE = "run without overrides of the MoE configuration"
# What one role does not rest on; the draft's layers are compared by themselves.
LEFT_OUT: Mapping[Role, Collection[str]] = {
    "main": {"draft_layers"},
    "draft": {"main_layers", "draft_layers", "num_hidden_layers"},
}


class Attributes(Mapping[str, Any]):
    """An engine's configuration as the object of config.json that it was made of.

    It is asked as the engine's models ask it, so other names and defaults of its class count.
    """

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getitem__(self, key: str) -> Any:
        try:
            value = getattr(self._config, key)
        except AttributeError:
            raise KeyError(key) from None
        return list(value) if isinstance(value, tuple) else value

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self._config))

    def __len__(self) -> int:
        return len(vars(self._config))


def config_differs(decision: Merged | Paired, config: Any) -> Iterator[Reason]:
    """Refuse where the configuration that runs is not the one that was decided on.

    Both are read by the same code: what a decision rests on cannot be left out here.

    Args:
        config: of the language model, with overrides and whatever else the engine has put into it.
    """
    family, declared = decision.family, decision.config
    if declared is None:
        yield Reason("config.differs", "nothing is known of what config.json says")
        return
    running = Attributes(config)
    named = running.get("model_type")
    if decision.role == "main" and named is not None and family_of(named) is not family:
        said = f"model_type is {named!r}, config.json says {decision.model_type!r}"
        yield Reason("config.differs", f"{said}; {ADVICE}")
        return
    try:
        moe = moe_of(family, running, "the configuration that runs")
    except FsePatchError as error:
        yield Reason("config.differs", f"{error}; {ADVICE}")
        return
    if _differs(decision, declared, moe):
        keys = [key for key in moe.values if moe.values[key] != declared.values.get(key)]
        said = "; ".join(
            f"{key} is {running.get(key)!r}, config.json says {declared.values.get(key)!r}" for key in keys
        )
        yield Reason("config.differs", f"{said or 'its layers differ'}; {ADVICE}")


def substituted(*configs: Any) -> Iterator[Reason]:
    """Refuse where experts are left out of the tensors, and constants stand in: vLLM, from 0.33 on.

    Args:
        configs: of the language model, and of the whole one, as objects with attributes.
    """
    for config in configs:
        declared: Any = getattr(config, "compression_config", None)
        for key in ("transform_config", "expert_substitution"):
            declared = declared.get(key) if isinstance(declared, Mapping) else None
        if declared is not None or getattr(config, "approximate_experts", None) is not None:
            why = "config.json has constants stand in for some experts (approximate_experts)"
            yield Reason("backend.routing", why)
            return


def _differs(decision: Merged | Paired, declared: MoeConfig, moe: MoeConfig) -> bool:
    """Tell whether anything differs that the role rests on."""
    family, left_out = decision.family, set(LEFT_OUT[decision.role])
    if family.draft_after_main:
        left_out.discard("num_hidden_layers")
    names = [f.name for f in dataclasses.fields(MoeConfig) if f.compare and f.name not in left_out]
    if any(getattr(moe, name) != getattr(declared, name) for name in names):
        return True
    if decision.role == "draft" and moe.draft_layers and moe.draft_layers != decision.moe.layers:
        return True
    # Families that ignore these keys do so in the releases that were read.
    ignored = () if family.grouped_routing else tuple(UNGROUPED)
    return any(moe.values[key] != declared.values.get(key) for key in ignored)
