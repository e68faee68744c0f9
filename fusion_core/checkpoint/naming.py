"""Checkpoint tensor names of MoE layers, matched on dotted boundaries and never as substrings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

from .families import FamilySpec, Role, families

# No model has more; and Python refuses to read numbers of thousands of digits.
MAX_DIGITS = 6
_NUMBER = rf"\d{{1,{MAX_DIGITS}}}"
Projection = Literal["gate_proj", "up_proj", "down_proj", "gate_up_proj"]


@dataclass(frozen=True)
class ExpertTensor:
    """Place of an expert tensor, as its name in a checkpoint says.

    ``expert`` is the routed expert's number, None for the shared expert, and -1 where one
    three-dimensional tensor holds all routed experts. ``suffix`` is the part of the projection
    ("weight", "weight_scale_inv", ...); a bare three-dimensional tensor has the suffix "weight".
    """

    role: Role
    layer: int
    expert: int | None
    projection: Projection
    suffix: str

    @property
    def is_shared(self) -> bool:
        """Return True for the shared expert."""
        return self.expert is None


@dataclass(frozen=True)
class TensorNaming:
    """Reader of the tensor names of one checkpoint, as an engine takes them.

    Args:
        num_hidden_layers: of the main model.
        engine: one that takes more names than all do, or "".
    """

    family: FamilySpec
    num_hidden_layers: int
    engine: str = ""

    @cached_property
    def _layer(self) -> str:
        mapped = next((p for e, p in self.family.mapped_prefixes if e == self.engine), ())
        prefixes = "|".join(re.escape(p) for p in (*mapped, *self.family.layer_prefixes))
        draft = re.escape(self.family.draft_prefix) if self.family.draft_prefix else r"(?!)"
        return rf"(?:(?P<main>{prefixes})|(?P<draft>{draft}))(?P<layer>{_NUMBER})\.mlp\."

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(
            rf"{self._layer}(?:(?P<shared>{re.escape(self.family.shared_module)})\."
            rf"|experts\.(?:(?P<expert>{_NUMBER})\.)?)"
            rf"(?P<projection>gate_up_proj|gate_proj|up_proj|down_proj)"
            rf"(?:[._](?P<suffix>[\w.]+))?",
            re.ASCII,
        )

    def parse(self, name: str) -> ExpertTensor | None:
        """Parse the name of an expert tensor; None for every other tensor of the checkpoint."""
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        role, layer = self._role_and_layer(match)
        expert = None if match["shared"] else int(match["expert"]) if match["expert"] else -1
        projection = cast(Projection, match["projection"])
        # Only tensors of all experts at once are parameters themselves; single experts have modules.
        if expert != -1 and name[match.end("projection") :][:1] != ".":
            return None
        return ExpertTensor(role, layer, expert, projection, match["suffix"] or "weight")

    @cached_property
    def _inside(self) -> re.Pattern[str]:
        # Any family's shared expert: one under another family's name is no less in doubt.
        modules = "|".join(re.escape(name) for name in sorted({f.shared_module for f in families()}))
        return re.compile(rf"{self._layer}(?:{modules}|experts)\.", re.ASCII)

    def layer_of_unknown(self, name: str) -> tuple[Role, int] | None:
        """Place a tensor within the experts that `parse` does not know: its role and layer, or None."""
        match = self._inside.match(name)
        return None if match is None else self._role_and_layer(match)

    @cached_property
    def _anywhere(self) -> re.Pattern[str]:
        modules = "|".join(re.escape(name) for name in sorted({f.shared_module for f in families()}))
        return re.compile(rf"(?:.*\.)?mlp\.(?:{modules}|experts)\.", re.ASCII)

    def role_of(self, name: str) -> Role:
        """Return the role of an expert tensor's layer."""
        match = self._inside.match(name)
        return "main" if match is None else self._role_and_layer(match)[0]

    def role_of_unplaced(self, name: str) -> Role | None:
        """Return the role of a tensor of experts under a prefix that is no layer's here, or None.

        An engine may map it to a layer, or drop it. Main models drop what stands below a module "mtp".
        """
        if ".mlp." not in name or self._anywhere.match(name) is None or self._inside.match(name):
            return None
        return "draft" if "mtp" in name.split(".") else "main"

    def _role_and_layer(self, match: re.Match[str]) -> tuple[Role, int]:
        layer = int(match["layer"])
        after = self.family.draft_after_main and layer >= self.num_hidden_layers
        return "draft" if match["draft"] or after else "main", layer
