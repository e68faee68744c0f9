"""Faults before anything is built: in what an engine is told, in the decision, in the patches."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

from fse_patch import session
from fse_patch.adapters.load import RoleLoader
from fse_patch.adapters.patching import guards, standing

from . import building
from .plant import adapter, plant

Context = AbstractContextManager[Any]


@plant
def config_overridden_at_run_time(engine: str) -> Context:
    """As with --hf-overrides and --json-model-override-args."""
    if engine == "vllm":
        from . import on_vllm

        return patch.dict(on_vllm.ARGUMENTS, hf_overrides={"num_experts_per_tok": 1})
    from sglang.srt.configs.model_config import ModelConfig

    honest = ModelConfig.from_server_args

    def from_server_args(*args: Any, **kwargs: Any) -> Any:
        config = honest(*args, **kwargs)
        config.hf_text_config.num_experts_per_tok = 1
        return config

    return patch.object(ModelConfig, "from_server_args", from_server_args)


@plant
def draft_decided_as_main(engine: str) -> Context:
    """The draft is built on the main model's decision."""
    return patch.object(adapter(engine, "start"), "role_of", lambda *_: "main")


@plant
def main_decided_as_draft(engine: str) -> Context:
    return patch.object(adapter(engine, "start"), "role_of", lambda *_: "draft")


@plant
def unknown_model_taken_for_an_entry_class(engine: str) -> Context:
    """Another model inherits the block, and someone lists its class."""
    return patch.object(adapter(engine, "start"), "role_of", lambda *_: "main")


@plant
def decided_again_before_loading(_: str) -> Context:
    """Loader and constructor each decide, and the policy has changed between: two slots, not four."""
    honest = RoleLoader.load

    def load(self: Any, original: Any, weights: Any) -> Any:
        start = self.role.start
        layout = dataclasses.replace(start.moe.layout, num_shared_slots=2)
        self.role.start = dataclasses.replace(start, moe=dataclasses.replace(start.moe, layout=layout))
        return honest(self, original, weights)

    return patch.object(RoleLoader, "load", load)


@plant
def decided_again_for_fewer_layers(_: str) -> Context:
    """The decision that the loader reads has one layer less; blocks have it all."""
    honest = RoleLoader.load

    def load(self: Any, original: Any, weights: Any) -> Any:
        self.role.layers = {n: layer for n, layer in self.role.layers.items() if n != 1}
        return honest(self, original, weights)

    return patch.object(RoleLoader, "load", load)


@plant
def model_left_active(engine: str) -> Context:
    """Another model is built below a decision that is not its own: its block would fuse, unremapped."""
    build = adapter(engine, "build")
    honest = build.start_of

    def start_of(*args: Any) -> Any:
        start = honest(*args)
        return dataclasses.replace(start, moe=dataclasses.replace(start.moe, layers=(7,)))

    return patch.object(build, "start_of", start_of)


@contextmanager
def patched_anew(engine: str, cause: Context) -> Any:
    """The patches are taken out and put in again while something is wrong; a refusal ends the start."""
    session.remove(engine)
    try:
        with cause:
            session.apply(engine)
        yield
    finally:
        session.apply(engine)


@plant
def source_of_another_fingerprint(engine: str) -> Context:
    honest = standing.fingerprint
    block = f"{building.MODELS[engine]}.{building.QWEN[0]}:{building.QWEN[1]}.__init__"

    def fingerprint(reference: str, *args: Any) -> Any:
        return "0123456789abcdef" if reference == block else honest(reference, *args)

    return patched_anew(engine, patch.object(standing, "fingerprint", fingerprint))


@plant
def source_that_is_gone(engine: str) -> Context:
    honest = standing.fingerprint
    block = f"{building.MODELS[engine]}.{building.QWEN[0]}:{building.QWEN[1]}.__init__"

    def fingerprint(reference: str, *args: Any) -> Any:
        return None if reference == block else honest(reference, *args)

    return patched_anew(engine, patch.object(standing, "fingerprint", fingerprint))


@plant
def release_that_nobody_tested(engine: str) -> Context:
    return patched_anew(engine, patch.object(guards, "engine_version", lambda *_: "0.0.1"))


@plant
def replaced_by_another_plugin_before(engine: str) -> Context:
    """The source is the known one, and the name holds something else by now."""

    def foreign(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("never called")

    @contextmanager
    def cause() -> Any:
        home = building.module(engine)
        with patch.object(home, building.FACTORY[engine], foreign):
            yield

    return patched_anew(engine, cause())


@plant
def ours_is_broken_in_this_process(engine: str) -> Context:
    """A factory of ours cannot be made in this process, as a child that lacks a part of the package."""

    def broken(_: Any) -> Any:
        raise RuntimeError("a factory that fails here")

    return patched_anew(engine, patch.object(adapter(engine, "build"), "block_init", broken))
