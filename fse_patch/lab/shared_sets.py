"""Layers that share their experts' weights in turn, so that several engines fit one card: for measuring."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import torch
import wrapt

from ..errors import FsePatchError

METHOD = "UnquantizedFusedMoEMethod"
Shapes = tuple[tuple[str, torch.Size], ...]


class SharedSets:
    """The i-th MoE layer that is built uses the storage of layer i mod ``number``; 0: each its own.

    Layers share with those of the same shapes. No memory is allocated for the others.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.layers: dict[Shapes, list[torch.nn.Module]] = defaultdict(list)

    def install(self, module: str) -> None:
        """Change the engine's class `METHOD` when ``module``, which has it, is imported."""
        if self.number:
            wrapt.register_post_import_hook(lambda imported: self.wrap(getattr(imported, METHOD)), module)

    def wrap(self, method: Any) -> None:
        """Change ``method``, a class that creates weights and processes what was loaded."""
        create, process = method.create_weights, method.process_weights_after_loading

        @functools.wraps(create)
        def create_weights(held: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
            self._create(functools.partial(create, held), layer, *args, **kwargs)

        @functools.wraps(process)
        def process_weights(held: Any, layer: Any) -> None:
            process(held, layer)
            # An engine that packs experts has given the layer memory of its own again.
            self._share(layer)

        method.create_weights = create_weights
        method.process_weights_after_loading = process_weights

    def _create(self, create: Any, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            create(layer, *args, **kwargs)
        names = [n for n, p in layer.named_parameters(recurse=False) if p.is_meta]
        shapes = tuple((name, getattr(layer, name).shape) for name in names)
        built = self.layers[shapes]
        built.append(layer)
        if len(built) <= self.number:
            create(layer, *args, **kwargs)
            return
        first = built[(len(built) - 1) % self.number]
        for name in names:
            outline = getattr(layer, name)
            shared = torch.nn.Parameter(getattr(first, name).data, requires_grad=False)
            shared.__dict__.update(outline.__dict__)  # what weight loaders look at
            layer.register_parameter(name, shared)

    def _share(self, layer: torch.nn.Module) -> None:
        for shapes, built in self.layers.items():
            index = next((i for i, other in enumerate(built) if other is layer), 0)
            if index < self.number:
                continue
            for name, _ in shapes:
                mine, first = getattr(layer, name), getattr(built[index % self.number], name)
                if mine.shape == first.shape:
                    mine.data = first.data

    def check(self) -> dict[str, int]:
        """Return what was built: ``layers``, and the ``sets`` of weights that they have.

        Raises:
            FsePatchError: weights are not shared as asked.
        """
        if not self.number:
            return {}
        if not self.layers:
            raise FsePatchError(f"--sets {self.number}: no layer has the weights of {METHOD}")
        for shapes, built in self.layers.items():
            for name, _ in shapes:
                places = len({getattr(layer, name).data_ptr() for layer in built})
                if places != min(self.number, len(built)):
                    raise FsePatchError(
                        f"--sets {self.number}: {name} of {len(built)} layers lies in {places} places"
                    )
        counted = [len(built) for built in self.layers.values()]
        return {"layers": sum(counted), "sets": sum(min(self.number, n) for n in counted)}
