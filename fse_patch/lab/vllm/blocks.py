"""MoE blocks of the installed vLLM, stock and fused, of the same random weights; for measuring."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ... import settings
from ...adapters.role import CONSTRUCTED, FusedRole, building
from ...adapters.start import Start
from ...adapters.vllm.formats import ExpertFormat, format_of
from ...adapters.vllm.plan import backend, situation
from ...adapters.vllm.role import Slots
from ...errors import FsePatchError
from ...fusion_core.checkpoint.naming import TensorNaming
from ...fusion_core.checkpoint.sources import FolderSource
from ...fusion_core.checkpoint.weight_files import CheckpointFiles
from ...fusion_core.decision.layout import ExpertLayout
from ...fusion_core.decision.outcome import Merged
from ...fusion_core.forward.plan import always
from ..model_block import build_block
from ..random_weights import as_slots, fill
from .quant_folder import quantised_folder


class Pair:
    """Stock and fused blocks of one model, in pairs of the same random weights.

    Args:
        folder: has the model's config.json.
        decision: of that folder.
        layers: how many pairs; one pair's weights would stay in the cache.
        quant: measure as if the experts were in this format, of `QUANTISATIONS`; "": as the folder says.
    """

    # Stock's shared expert is an MLP of its own.
    native = False

    def __init__(
        self, folder: Path, decision: Merged, layers: int, dtype: str = "bfloat16", quant: str = ""
    ) -> None:
        from vllm.engine.arg_utils import EngineArgs

        if quant:
            # What is measured is not served: no checkpoint has to be proved for it.
            decision = dataclasses.replace(decision, quant_method="fp8", formats=(quant,))
        with quantised_folder(folder, quant) as model:
            self.config = EngineArgs(
                model=str(model),
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype=dtype,
                enforce_eager=True,
            ).create_engine_config()
        self.decision = decision
        form = format_of(decision, self.config)
        if form is None:
            raise FsePatchError(f"{folder}: experts in {', '.join(decision.formats)} are not measured")
        self.form = form
        self.itemsize = (torch.float8_e4m3fn if form.scale else torch.bfloat16).itemsize
        moe = decision.moe
        family = decision.family
        naming = TensorNaming(family, len(moe.layers))
        self.layout = moe.layout
        with self._engine():
            picked = backend(form, self.config, self.layout, self.layout.num_routed, self.layout.top_k)
            self.situation = situation(form, decision, self.config, picked)
            # No weights come from there; every mode is asked for by name.
            files = CheckpointFiles(FolderSource(folder))
            plan = always("fused", "measuring")
            start = Start(decision, moe, naming, files, plan, settings.load(), form)
            self.fused_role = FusedRole(start, Slots())
            CONSTRUCTED.add(self.fused_role)  # as in the engine, tables for E stand in for those for E+S
            self.stock = [self._build(family.name, layer + 1000) for layer in range(layers)]
            with building(self.fused_role):
                self.fused = [self._build(family.name, layer) for layer in moe.layers[:layers]]
            for number, (stock, fused) in enumerate(zip(self.stock, self.fused, strict=True)):
                fill(stock, number)
                copy(stock, fused, family.shared_module, self.layout)
                for block in (stock, fused):
                    process(block)
            self.fused_role.open()

    @contextlib.contextmanager
    def _engine(self) -> Iterator[None]:
        from vllm.config import set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel
        from vllm.distributed.parallel_state import model_parallel_is_initialized
        from vllm.utils.torch_utils import set_default_torch_dtype
        from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

        with (
            set_current_vllm_config(self.config),
            set_default_torch_dtype(self.config.model_config.dtype),
            torch.device("cuda"),
            torch.no_grad(),
        ):
            if not model_parallel_is_initialized():
                init_distributed_environment(1, 0, "tcp://127.0.0.1:29519", 0)
                initialize_model_parallel(1, 1)
            if not is_workspace_manager_initialized():
                init_workspace_manager(torch.device("cuda"))
            yield

    def _build(self, family: str, layer: int) -> Any:
        return build_block("vllm", family, self.config, prefix=f"model.layers.{layer}.mlp")

    def exact(self, expert: int, name: str) -> torch.Tensor:
        """Return w13 [2 * I, H] or w2 [H, I] of an expert of the first fused block, in float64."""
        return exact(self.fused[0].experts.routed_experts, expert, name, self.form)

    @contextlib.contextmanager
    def forward_context(self, tokens: int) -> Iterator[None]:
        """Run blocks within it as in the engine."""
        from vllm.forward_context import get_forward_context, set_forward_context

        with self._engine(), set_forward_context(None, self.config, num_tokens=tokens):
            get_forward_context().all_moe_layers = None
            yield


def process(block: Any) -> None:
    """Do with loaded weights what the engine does."""
    for module in block.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "process_weights_after_loading"):
            method.process_weights_after_loading(module)


def copy(stock: Any, fused: Any, shared: str, layout: ExpertLayout) -> None:
    """Copy the weights of a stock block, as loaded, to where a fused one has them."""
    routed, ours = stock.experts.routed_experts, fused.experts.routed_experts
    mlp, first = getattr(stock, shared), layout.num_routed
    for name, parameter in ours.named_parameters(recurse=False):
        kind, _, suffix = name.partition("_")
        if kind not in ("w13", "w2"):
            continue
        bits(parameter.data)[:first].copy_(bits(getattr(routed, name).data))
        source = getattr(mlp.gate_up_proj if kind == "w13" else mlp.down_proj, suffix).data
        slots = as_slots(bits(source), kind, layout.num_shared_slots)
        bits(parameter.data)[first:].copy_(slots)
    ours_too = dict(fused.named_parameters())
    for name, parameter in stock.named_parameters():
        if ".routed_experts." not in name and name in ours_too:
            ours_too[name].data.copy_(parameter.data)


def bits(values: torch.Tensor) -> torch.Tensor:
    """Return FP8 numbers of any shape as uint8: not every operation takes them."""
    return values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values


def exact(experts: Any, expert: int, name: str, form: ExpertFormat) -> torch.Tensor:
    """Return w13 [2 * I, H] or w2 [H, I] of one expert in float64, its scales in it."""
    weight: torch.Tensor = getattr(experts, f"{name}_weight").data[expert]
    if not form.scale:
        return weight.double()
    from ...fusion_core.kernels.experts_fp8 import dequantised  # needs Triton

    scale = getattr(experts, f"{name}_{form.scale}").data[expert]
    block = form.block or (0, 0)
    scale = scale[None] if form.block else scale.view(1, 1, 1)
    return dequantised(weight[None], scale, block, halves=2 if name == "w13" else 1)[0]
