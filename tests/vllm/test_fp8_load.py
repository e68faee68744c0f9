"""FP8 checkpoints through vLLM's real layers and loaders: slots hold the checkpoint's bytes and scales.

Nothing runs here: a CPU has no kernels for these layers, so models are built and loaded, and no further.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from .engine import Checkpoints
from .processes import in_process
from .test_inherited import building, load

ENTRY = "vllm.model_executor.models.qwen2_moe:Qwen2MoeForCausalLM"
# Values of 2 layers that are looked for: 64 of each weight, and every scale, for H 64, I 32 and blocks of 32.
COMPARED = {
    "tensor": 2 * (3 * 64 + 3),
    "tensor, static": 2 * (3 * 64 + 3 + 3),
    "block": 2 * (3 * 64 + 3 * 2),
    "channel": 2 * (3 * 64 + 32 + 32 + 64),
}


def quantised(source: Path, out: Path, scheme: str) -> str:
    """A copy of a plain checkpoint with all experts in FP8."""
    import torch
    from safetensors.torch import load_file, save_file

    from ..core.fp8 import SCHEMES, quantise

    how, kept, held = SCHEMES[scheme], [], {}
    out.mkdir()
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".mlp." not in name or not name.endswith("_proj.weight"):
            held[name] = tensor
            kept += [name.removesuffix(".weight")] * (tensor.ndim == 2)
            continue
        weight, scale = quantise(tensor.float(), how)
        held[name] = weight
        held[name.removesuffix("weight") + how.name] = (
            scale if how.shape is None else scale.reshape(how.shape)
        )
        if how.static:
            held[name.removesuffix("weight") + "input_scale"] = torch.full((1,), 0.01)
    save_file(held, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    section = {**how.config, "ignore" if "config_groups" in how.config else "modules_to_not_convert": kept}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return str(out)


def of_no_kernel(stack: ExitStack) -> None:
    """Lets layers be built whose kernels this machine has not: shared MLPs, which fusing drops at once."""
    nothing = SimpleNamespace(input_quant_key=lambda: None)
    for place in (
        "quantization.fp8",
        "quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8",
    ):
        module = importlib.import_module(f"vllm.model_executor.layers.{place}")
        stack.enter_context(patch.object(module, "init_fp8_linear_kernel", lambda *_, **__: nothing))


def probe(folder: str) -> dict[str, Any]:
    """Of each scheme: what was compared, and what a load says whose stream or slots are not right."""
    import torch
    from safetensors.torch import load_file
    from vllm.plugins import load_general_plugins

    from fse_patch.adapters.vllm.role import Slots
    from fse_patch.errors import AuditError

    load_general_plugins()
    found: dict[str, Any] = {}

    def loaded(scheme: str, change: Any = None) -> Any:
        checkpoint = quantised(
            Path(folder, "plain"), Path(folder, str(len(list(Path(folder).iterdir())))), scheme
        )
        tensors = load_file(f"{checkpoint}/model.safetensors").items()
        with building(checkpoint, "bfloat16") as config, ExitStack() as stack:
            of_no_kernel(stack)
            if change is not None:
                take = Slots.take

                def other(self: Any, parameter: Any, part: Any, name: str) -> bool:
                    return take(self, parameter, change(part), name)

                stack.enter_context(patch.object(Slots, "take", other))
            model = load(ENTRY)(vllm_config=config)
            try:
                model.load_weights(tensors)
            except AuditError as error:
                return str(error)
        report = model._fse_patch.report()
        return {name: report[name] for name in ("compared", "not_compared")}

    def other_scale(part: Any) -> Any:
        if part.suffix == "weight" or part.shard != "w2":
            return part
        return dataclasses.replace(part, tensor=part.tensor * 1.01)

    def other_weight(part: Any) -> Any:
        if part.suffix != "weight" or part.shard != "w3":
            return part
        return dataclasses.replace(
            part, tensor=part.tensor.view(torch.uint8).roll(1, 0).view(part.tensor.dtype)
        )

    for scheme in COMPARED:
        found[scheme] = loaded(scheme)
        found[f"{scheme}: scale"] = loaded(scheme, other_scale)
        found[f"{scheme}: weight"] = loaded(scheme, other_weight)
    return found


@pytest.fixture(scope="module")
def found(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fp8")
    (folder / "plain").symlink_to(checkpoints.path("qwen2_moe", "bfloat16"))
    result: dict[str, Any] = in_process(
        f"{__name__}:probe", str(folder), FSE_PATCH="vllm", FSE_PATCH_ALLOW_UNPROVEN="1"
    )
    return result


@pytest.mark.parametrize("scheme", COMPARED)
def test_slots_hold_the_checkpoints_bytes_and_scales(found: dict[str, Any], scheme: str) -> None:
    assert found[scheme] == {"compared": COMPARED[scheme], "not_compared": []}


@pytest.mark.parametrize("what", ["scale", "weight"])
@pytest.mark.parametrize("scheme", COMPARED)
def test_another_scale_or_weight_is_not_served(found: dict[str, Any], scheme: str, what: str) -> None:
    assert "are not the checkpoint's; the model is not served" in found[f"{scheme}: {what}"]
