"""MoE blocks of the installed SGLang, stock and fused, of the same random weights; for measuring."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ... import settings
from ...adapters.role import CONSTRUCTED, FusedRole, building
from ...adapters.sglang.plan import NATIVE, situation
from ...adapters.sglang.refusals import UPSTREAM
from ...adapters.sglang.role import Slots
from ...adapters.start import Start
from ...errors import FsePatchError
from ...fusion_core.checkpoint.naming import TensorNaming
from ...fusion_core.checkpoint.sources import FolderSource
from ...fusion_core.checkpoint.weight_files import CheckpointFiles
from ...fusion_core.decision.outcome import Merged
from ...fusion_core.forward.plan import always
from ...fusion_core.reasons import Reason
from ..model_block import build_block
from ..random_weights import as_slots, fill
from .standalone import native_fusion_decided, start_sglang

EXPERTS = ("w13_weight", "w2_weight")
DEVICE = "cuda"


class Pair:
    """Stock and fused blocks of one model, in pairs of the same random weights.

    Where SGLang fuses by itself, its fused blocks are the stock ones; those with modes share their experts.

    Args:
        folder: has the model's config.json.
        decision: of that folder.
        layers: how many pairs; one pair's weights would stay in the cache.
        quant: as of `bench.open_pair`; "" alone is known.
    """

    # Of a weight, in bytes.
    itemsize = 2

    def __init__(
        self, folder: Path, decision: Merged, layers: int, dtype: str = "bfloat16", quant: str = ""
    ) -> None:
        if quant:
            raise FsePatchError(f"{quant}: SGLang's quantised blocks are not measured yet")
        self.config = start_sglang(folder, dtype)
        self.decision = decision
        moe = decision.moe
        self.layout = moe.layout
        family = decision.family
        naming = TensorNaming(family, len(moe.layers))
        with self._engine(), native_fusion_decided(self.config):
            self.stock = [self._build(family.name, layer) for layer in moe.layers[:layers]]
            self.native = self.stock[0].num_fused_shared_experts > 0
            backend = NATIVE if self.native else "triton"
            self.situation = situation(decision.engine, moe, self.config, backend)
            built = decision.refused(Reason(UPSTREAM, "measuring")) if self.native else decision
            # No weights come from there; every mode is asked for by name.
            files = CheckpointFiles(FolderSource(folder))
            plan = always("fused", "measuring")
            self.fused_role = FusedRole(Start(built, moe, naming, files, plan, settings.load()), Slots())
            CONSTRUCTED.add(self.fused_role)  # as in the engine, tables for E stand in for those for E+S
            with building(self.fused_role):
                self.fused = [self._build(family.name, layer) for layer in moe.layers[:layers]]
            for number, (stock, fused) in enumerate(zip(self.stock, self.fused, strict=True)):
                fill(stock, number, DEVICE)
                self._copy(stock, fused, family.shared_module)
                for block in (stock, fused):
                    # A block is called many times on the same states here: they must outlive it.
                    block.experts.moe_runner_config.inplace = False
            self.fused_role.open()

    @contextlib.contextmanager
    def _engine(self) -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.config.dtype)
        try:
            with torch.device(DEVICE), torch.no_grad():
                yield
        finally:
            torch.set_default_dtype(before)

    def _build(self, family: str, layer: int) -> Any:
        from sglang.srt.runtime_context import get_stream

        return build_block(
            "sglang",
            family,
            self.config,
            config=self.config.hf_text_config,
            layer_id=layer,
            quant_config=None,
            alt_stream=get_stream("alt"),
            prefix=f"model.layers.{layer}.mlp",
        )

    def _copy(self, stock: Any, fused: Any, shared: str) -> None:
        """Copy the weights of a stock block to where a fused one has them."""
        for name, parameter in fused.named_parameters():
            if not name.startswith("experts."):
                parameter.data.copy_(stock.get_parameter(name).data)
        theirs, ours = ([getattr(b.experts, n).data for n in EXPERTS] for b in (stock, fused))
        if self.native:
            for name, data in zip(EXPERTS, theirs, strict=True):
                getattr(fused.experts, name).data = data
            return
        mlp, routed, slots = getattr(stock, shared), self.layout.num_routed, self.layout.num_shared_slots
        dense = {"w13": mlp.gate_up_proj, "w2": mlp.down_proj}
        for source, target, (kind, layer) in zip(theirs, ours, dense.items(), strict=True):
            target[:routed].copy_(source)
            target[routed:].copy_(as_slots(layer.weight.data, kind, slots))

    def exact(self, expert: int, part: str) -> torch.Tensor:
        """Return "w13" [2 * I, H] or "w2" [H, I] of one expert of the first pair, in float64."""
        weight = getattr(self.fused[0].experts, f"{part}_weight")
        return torch.as_tensor(weight.data[expert]).double()

    @contextlib.contextmanager
    def forward_context(self, tokens: int) -> Iterator[None]:
        """Run blocks within it as while SGLang captures a graph of a decode step."""
        from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode

        with torch.no_grad(), model_capture_mode():
            yield
