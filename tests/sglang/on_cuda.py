"""Models that SGLang builds and loads as on CUDA, with the layers' modes, in a process of its own, on a CPU.

    python -m tests.sglang.on_cuda BUILDS.json RESULTS.json

Kernels of ours run in Triton's interpreter, SGLang's grouped GEMM in float64. A build is {"folder", "table",
"fault", "verify"}, and perhaps the device's "capability", arguments of the "server", and a "probe" of
`probes.py`; its result {"decisions", "report", "error"} and, of a model with modes, how many layers have
them, whether all are left to SGLang, what a call past them gives, and what the probe found.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import fse_patch
from fse_patch import runtime
from fse_patch.adapters import refusals
from fse_patch.adapters.sglang import native, plan
from fse_patch.adapters.sglang.run import ATTRIBUTE
from fse_patch.errors import FsePatchError
from fse_patch.lab.sglang import standalone

from . import probes

DEVICE_NAME = "Some GPU"


def grouped(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, **_: Any
) -> torch.Tensor:
    """SGLang's grouped GEMM."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            out[token] += weight.double() * (w2[expert].double() @ inner)
    return out.to(x.dtype)


@contextmanager
def cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """The models' modules believe that they are on a GPU, of a release whose layers run in modes."""
    from sglang.srt import runtime_context
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe
    from sglang.srt.models import glm4_moe, qwen2_moe

    from fse_patch.adapters.sglang import run

    qwen, glm = qwen2_moe.Qwen2MoeSparseMoeBlock, glm4_moe.Glm4MoeSparseMoeBlock
    wrapped = (
        (qwen, "_forward_router_experts", run.router_experts),
        (qwen, "forward_normal_dual_stream", run.dual_stream),
        (glm, "forward_normal", run.glm_forward),
    )
    with ExitStack() as stack:
        for module in (glm4_moe, qwen2_moe):
            stack.enter_context(patch.object(module, "_is_cuda", True))
        for owner, name, factory in wrapped:
            if not hasattr(getattr(owner, name), run.MARK):
                stack.enter_context(patch.object(owner, name, factory(getattr(owner, name))))
        stack.enter_context(patch.object(native, "platform", lambda: "cuda"))
        stack.enter_context(patch.object(runtime_context, "get_stream", lambda _: None))
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda *_: capability))
        stack.enter_context(patch.object(torch.cuda, "Stream", lambda *_: None))
        stack.enter_context(patch("sglang.srt.utils.get_device_name", lambda *_: DEVICE_NAME))
        stack.enter_context(patch.object(fused_moe, "outplace_fused_experts", grouped))
        yield


def shared_left_out(original: Any) -> Any:
    """A fault of one mode alone."""

    def small(x: torch.Tensor, experts: Any, weights: torch.Tensor, ids: torch.Tensor) -> Any:
        return original(x, experts, weights[:, :-1].contiguous(), ids[:, :-1].contiguous())

    return small


def start(folder: str, **server: Any) -> Any:
    """SGLang's state in this process; it is started once, and told of each model."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
    from sglang.srt.distributed import bootstrap, parallel_state
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(
        model_path=folder, dtype="bfloat16", device="cpu", skip_tokenizer_init=True,
        disable_radix_cache=True, attention_backend="torch_native", sampling_backend="pytorch", **server,
    )  # fmt: skip
    publish(args, role="scheduler")
    initialize_moe_config(*[args][: len(signature(initialize_moe_config).parameters)])
    config = ModelConfig.from_server_args(args)
    if not parallel_state.model_parallel_is_initialized():
        bootstrap.init_torch_distributed(
            server_args=args, model_config=config, device="cpu", ps=ParallelState.trivial(),
            dist_port=standalone.free_port(), is_draft_worker=False, local_omp_cpuid=None,
        )  # fmt: skip
    # As SGLang's own runner does on a CPU.
    return adjust_config_with_unaligned_cpu_tp(config, LoadConfig(), 1)


def left_and_past(fused_role: Any) -> dict[str, Any]:
    """Whether SGLang's own forward runs all blocks, and what their experts answer to another than them."""
    states = torch.zeros(1, fused_role.layout.hidden_size, dtype=torch.bfloat16)
    blocks = [layer.block for layer in fused_role.layers.values()]
    found = {"left": all(getattr(block, ATTRIBUTE).is_left(states) for block in blocks), "past": ""}
    if fused_role.start.merged:
        try:
            blocks[0].experts(states, None)
        except FsePatchError as error:
            found["past"] = str(error)
    return found


def build(
    folder: str,
    table: str,
    fault: bool,
    verify: str,
    capability: tuple[int, int] = (9, 0),
    server: dict[str, Any] | None = None,
    probe: str = "",
) -> dict[str, Any]:
    """What became of one model."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import get_model

    from fse_patch.fusion_core.forward.modes import small as small_mode

    runtime.clear()
    found: dict[str, Any] = {"report": None, "error": ""}
    kernels = small_mode.experts
    small = shared_left_out(kernels.small_experts) if fault else kernels.small_experts
    env = {"FSE_PATCH_TUNED": table, "FSE_PATCH_VERIFY": verify}
    with cuda(tuple(capability)), patch.dict(os.environ, env), ExitStack() as stack:
        stack.enter_context(patch.object(kernels, "small_experts", small))
        config = start(folder, **(server or {}))
        try:
            model = get_model(
                model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu")
            )
            if (fused_role := getattr(model, "_fse_patch", None)) is not None:
                found["report"] = fused_role.report()
                layers = fused_role.layers.values()
                found["executions"] = sum(layer.execution is not None for layer in layers)
                found |= left_and_past(fused_role)
                found["probe"] = probes.PROBES[probe](fused_role) if probe else None
        # SGLang's own errors too: what it cannot build here, it was to be left alone with.
        except (FsePatchError, ImportError, NotImplementedError) as error:
            found["error"] = f"{type(error).__name__}: {error}"
    return {**found, "decisions": runtime.decisions()}


def main(request: Path, results: Path) -> None:
    """Run all builds."""
    os.environ["FSE_PATCH"] = "sglang"
    fse_patch.apply("sglang")
    assert plan.measured is refusals.measured
    results.write_text(json.dumps([build(**given) for given in json.loads(request.read_text())]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
