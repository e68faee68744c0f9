"""What a job's ``steps`` do to a running engine: update its weights, build further models in its scheduler.

A step is a name in STEPS and its arguments; the result has what each gave.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from fse_patch import runtime
from fse_patch.adapters.sglang import native
from fse_patch.lab.free_port import free_port
from fse_patch.lab.sglang import verify_arm

TOKENS = 16


def logprobs(engine: Any, job: dict[str, Any]) -> Any:
    scored = verify_arm.score(engine, job["prompts"], 1, batched=True)["logprobs"]
    # An update flushes the cache, and SGLang ends when it finds the last answer not wound up yet.
    for _ in range(100):
        if engine.flush_cache().success:
            return scored
        time.sleep(0.05)
    raise TimeoutError("the engine does not come to rest")


def from_disk(engine: Any, job: dict[str, Any], folder: str) -> Any:
    """A user's full update."""
    done, message = engine.update_weights_from_disk(folder)[:2]
    assert done, message


@contextmanager
def an_update(engine: Any) -> Iterator[None]:
    """Newer releases want to know where an update begins and ends."""
    if sessions := hasattr(engine, "begin_weight_update"):
        engine.begin_weight_update()
    yield
    if sessions:
        engine.end_weight_update()


def tensors_of(folder: str) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}


def from_tensors(
    engine: Any, job: dict[str, Any], folder: str, names: str, load_format: str | None = None
) -> int:
    """A user's partial update: the tensors of a checkpoint whose names match, handed over in memory."""
    chosen = [(name, tensor) for name, tensor in tensors_of(folder).items() if re.search(names, name)]
    with an_update(engine):
        done, message = engine.update_weights_from_tensor(chosen, load_format=load_format)[:2]
    assert done, message
    return len(chosen)


def from_trainer(engine: Any, job: dict[str, Any], folder: str) -> Any:
    """A trainer's update: it makes a group with the engine's processes, and sends them every tensor."""
    from sglang.srt.utils.common import init_custom_process_group

    held, port, size = tensors_of(folder), free_port(), engine.server_args.tp_size + 1
    place = {"init_method": f"tcp://127.0.0.1:{port}", "world_size": size, "rank": 0}

    def send(group: Any) -> None:
        for tensor in held.values():
            torch.distributed.broadcast(tensor, src=0, group=group)

    with ThreadPoolExecutor(1) as trainer:
        joined = trainer.submit(init_custom_process_group, backend="gloo", group_name="trainer", **place)
        done, message = engine.init_weights_update_group("127.0.0.1", port, 1, size, "trainer", "gloo")
        assert done, message
        sent = trainer.submit(send, joined.result())
        with an_update(engine):
            told = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in held.values()]
            dtypes, shapes = zip(*told, strict=True)
            done, message = engine.update_weights_from_distributed(
                list(held), list(dtypes), list(shapes), "trainer"
            )[:2]
        assert done, message
        sent.result()


def save(engine: Any, job: dict[str, Any], folder: str) -> str:
    """What SGLang says when it is asked for its own files of the model; nothing where it writes them."""
    try:
        engine.save_sharded_model(path=folder, pattern=None, max_size=None)
    except Exception as error:
        return str(error)
    return ""


def build(engine: Any, job: dict[str, Any], folder: str, draft: bool, platform: str = "") -> Any:
    """A further model, built and loaded by SGLang's own loader in its scheduler."""
    with tempfile.TemporaryDirectory() as out:
        file = Path(out) / "result.json"
        engine.collective_rpc("fse_build", file=str(file), folder=folder, draft=draft, platform=platform)
        return json.loads(file.read_text())


def reports(engine: Any, job: dict[str, Any]) -> Any:
    return verify_arm.reports(engine)


def prove(engine: Any, job: dict[str, Any], builds: list[list[str]]) -> Any:
    """What the canary says of further models: folder, fault of `proving` or "", FSE_PATCH_VERIFY."""
    with tempfile.TemporaryDirectory() as out:
        file = Path(out) / "result.json"
        engine.collective_rpc("fse_prove", file=str(file), builds=builds)
        return json.loads(file.read_text())


def rocm(engine: Any, job: dict[str, Any], builds: list[list[Any]]) -> Any:
    """What the canary says of further models as on ROCm: folder, profile of AITER, whether with a fault."""
    with tempfile.TemporaryDirectory() as out:
        file = Path(out) / "result.json"
        engine.collective_rpc("fse_rocm", file=str(file), builds=builds)
        return json.loads(file.read_text())


def heads(engine: Any, job: dict[str, Any]) -> Any:
    """Of each LM head in 8 bits: up to how many tokens it runs, and what is wrong with it now, or ""."""
    with tempfile.TemporaryDirectory() as out:
        file = Path(out) / "result.json"
        engine.collective_rpc("fse_heads", file=str(file))
        return json.loads(file.read_text())


STEPS = {
    f.__name__: f
    for f in (logprobs, from_disk, from_tensors, from_trainer, save, build, prove, rocm, reports, heads)
}


@contextmanager
def pretend(platform: str) -> Iterator[None]:
    """Let the models' modules believe that they are on a GPU that SGLang fuses on by itself."""
    from sglang.srt.models import glm4_moe, qwen2_moe

    with ExitStack() as stack:
        stack.enter_context(patch.object(native, "platform", lambda: platform))
        if platform == "cuda":
            for module in (glm4_moe, qwen2_moe):
                stack.enter_context(patch.object(module, "_is_cuda", True))
            stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)))
            stack.enter_context(patch.object(torch.cuda, "Stream", object))
        yield


def built(scheduler: Any, folder: str, draft: bool = False, platform: str = "") -> tuple[Any, Any]:
    """A model that SGLang's own loader builds and loads in its scheduler, and its configuration."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
    from sglang.srt.layers.moe.utils import draft_model_build_scope
    from sglang.srt.model_loader import get_model

    args = scheduler.tp_worker.model_runner.server_args
    config = ModelConfig.from_server_args(args, model_path=folder, is_draft_model=draft)
    config = adjust_config_with_unaligned_cpu_tp(config, LoadConfig(), 1)  # as its own runner does
    with ExitStack() as stack:
        # Qwen3.8's hyper-connections ask CUDA where they are.
        stack.enter_context(patch.object(torch.cuda, "current_device", lambda: "cpu"))
        if draft:
            stack.enter_context(draft_model_build_scope())
        if platform:
            stack.enter_context(pretend(platform))
        model = get_model(
            model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu")
        ).eval()
    return model, config


def fse_build(self: Any, file: str, folder: str, draft: bool, platform: str) -> None:
    """Runs in the scheduler."""
    model, config = built(self, folder, draft, platform)
    blocks = [m for m in model.modules() if hasattr(m, "experts") and hasattr(m, "topk")]
    fused_role = getattr(model, "_fse_patch", None)
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "blocks": [
            {
                "slots": block.experts.num_fused_shared_experts,
                "num_experts": block.experts.num_experts,
                "shared_mlp": any(
                    getattr(block, name, None) is not None for name in ("shared_expert", "shared_experts")
                ),
            }
            for block in blocks
        ],
        "decisions": runtime.decisions(),
        "report": fused_role.report() if fused_role else None,
    }
    if not platform:
        draw = torch.Generator().manual_seed(1)
        hidden = torch.randn(TOKENS, config.hf_text_config.hidden_size, generator=draw)
        with torch.no_grad():
            found["output"] = [block(hidden.clone()).tolist() for block in blocks]
            if fused_role:
                with ExitStack() as stack:
                    for layer in fused_role.layers.values():
                        stack.enter_context(layer.weighted(1.01))
                    found["control"] = [block(hidden.clone()).tolist() for block in blocks]
    runtime.clear()
    Path(file).write_text(json.dumps(found))


def fse_heads(self: Any, file: str) -> None:
    """Runs in the scheduler."""
    from fse_patch.adapters.head import constructed

    found = [(own.limit, own.fault(TOKENS)) for own in constructed()]
    Path(file).write_text(json.dumps([(limit, fault.code if fault else "") for limit, fault in found]))


def extend(scheduler: Any) -> None:
    """Give the Scheduler class what a step calls."""
    from . import on_rocm, proving

    scheduler.Scheduler.fse_build, scheduler.Scheduler.fse_heads = fse_build, fse_heads
    scheduler.Scheduler.fse_prove = proving.fse_prove
    scheduler.Scheduler.fse_rocm = on_rocm.fse_rocm


def run_steps(job: dict[str, Any]) -> dict[str, Any]:
    """Start the job's engine and do its steps."""
    steps = job["engine_args"].pop("steps")
    engine = verify_arm.start(job)
    try:
        return {"steps": [STEPS[name](engine, job, **given) for name, given in steps]}
    finally:
        engine.shutdown()
