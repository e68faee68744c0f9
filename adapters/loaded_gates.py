"""The shared experts' gates after a load: each must answer by the weights that have just come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from ..errors import AuditError
from ..fusion_core.checkpoint.naming import TensorNaming
from ..fusion_core.forward.layer import FusedLayer
from ..fusion_core.proof.rounding import UNIT
from ..fusion_core.weights.remap import Named

PROBES = 8
# A row of weights may be rounded on its way, and the answer too.
LEAST_TOLERANCE, ROUNDINGS = 1e-4, 4


class LoadedGates:
    """The gates of one load, kept as they pass, and compared with what the routers call."""

    def __init__(self, naming: TensorNaming, role: str) -> None:
        self.naming, self.role = naming, role
        # Name of the gate's module in checkpoints and in engines' blocks, None where there is none.
        self.gate = naming.family.shared_gate
        self._rows: dict[int, torch.Tensor] = {}

    def watch(self, stream: Iterable[Named]) -> Iterator[Named]:
        """Yield the stream, unchanged."""
        if self.gate is None:
            yield from stream
            return
        end, module = f".{self.gate}.weight", f".{self.naming.family.shared_module}"
        for name, tensor in stream:
            # A quantised one is not what its bytes say.
            if name.endswith(end) and tensor.is_floating_point() and tensor.element_size() > 1:
                # The same place as a tensor of the shared expert.
                ref = self.naming.parse(name.removesuffix(end) + f"{module}.up_proj.weight")
                if ref is not None and ref.role == self.role:
                    self._rows[ref.layer] = tensor.detach().to("cpu", copy=True)
            yield name, tensor

    def check(self, layers: Mapping[int, FusedLayer]) -> None:
        """Compare, and forget.

        Raises:
            AuditError: a router calls another gate than the one that was loaded.
        """
        rows, self._rows = self._rows, {}
        for number in sorted(rows.keys() & layers.keys()):
            layer = layers[number]
            gate = layer.router.shared_gate
            module = getattr(layer.block, self.gate, None) if self.gate else None
            if gate is None or module is None:
                continue
            weight: torch.Tensor = module.weight
            row = rows[number].reshape(1, -1).double()
            draw = torch.Generator("cpu").manual_seed(number)
            probe = torch.randn(PROBES, row.shape[1], generator=draw, dtype=torch.float32, device="cpu")
            probe = probe.to(weight.dtype)
            with torch.no_grad():
                answer = gate(probe.to(weight.device)).to("cpu", torch.float64)
            expected = probe.double() @ row.T
            allowed = max(LEAST_TOLERANCE, ROUNDINGS * UNIT.get(weight.dtype, 0.0)) * expected.norm()
            if not bool((answer - expected).norm() <= allowed):
                raise AuditError(
                    f"{self.role} model: layer {number}: the shared expert's gate is not the one that was "
                    "loaded; the model is not served"
                )
