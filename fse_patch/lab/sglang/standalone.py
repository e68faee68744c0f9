"""SGLang's process-wide state without its scheduler: configuration and process groups, for single blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from ..free_port import free_port


def start_sglang(folder: Path, dtype: str) -> Any:
    """Set up this process for blocks of the model that a config.json describes, on one GPU; once a process.

    Returns:
        SGLang's ModelConfig.
    """
    import torch
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(
        model_path=str(folder),
        dtype=dtype,
        load_format="dummy",
        skip_tokenizer_init=True,
        disable_radix_cache=True,
        attention_backend="triton",
        sampling_backend="pytorch",
    )
    publish_alone(args)
    config = ModelConfig.from_server_args(args)
    torch.cuda.set_device(0)
    start_groups(args, config, "cuda")
    return config


def publish_alone(args: Any) -> None:
    """Tell SGLang of its ServerArgs, as of the only process of a server."""
    from sglang.srt import runtime_context
    from sglang.srt.layers.moe import initialize_moe_config

    # Newer releases want to know which process it is; they take no arguments for the rest.
    spawned = getattr(runtime_context, "SpawnRanks", None)
    ranks = {} if spawned is None else {"ranks": spawned(world_rank=0, dp_rank=None, gpu_id=0)}
    runtime_context.publish(args, role="scheduler", **ranks)
    initialize_moe_config(*[args][: len(signature(initialize_moe_config).parameters)])


@contextmanager
def native_fusion_decided(config: Any) -> Iterator[None]:
    """Build blocks as SGLang's loader has them built: it decides on its own fusion before any layer exists.

    Args:
        config: SGLang's ModelConfig, of an unquantised model.
    """
    from sglang.srt.layers.moe import utils
    from sglang.srt.model_loader.utils import get_model_architecture
    from sglang.srt.runtime_context import get_model

    asked = get_model_architecture(config)[0], config.hf_config, None
    if (resolve := getattr(utils, "resolve_shared_experts_config", None)) is not None:  # from 0.5.23 on
        with get_model().override(shared_experts=resolve(*asked)):
            yield
        return
    # In 0.5.17 the blocks decide.
    getattr(utils, "install_shared_experts_fusion_decision", lambda *_: None)(*asked)
    yield


def start_groups(args: Any, config: Any, device: str) -> None:
    """Make the process groups of one process, as the installed release makes them.

    Args:
        args: SGLang's ServerArgs, published.
        config: its ModelConfig.
        device: "cuda" or "cpu".
    """
    from sglang.srt.distributed import bootstrap

    if (init := getattr(bootstrap, "init_parallel_runtime", None)) is not None:
        init(server_args=args, device=device, dist_port=free_port())
        bootstrap.init_layer_runtime(model_config=config)
        return
    # Up to 0.5.20.
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState

    bootstrap.init_torch_distributed(
        server_args=args,
        model_config=config,
        device=device,
        ps=ParallelState.trivial(),
        dist_port=free_port(),
        is_draft_worker=False,
        local_omp_cpuid=None,
    )
