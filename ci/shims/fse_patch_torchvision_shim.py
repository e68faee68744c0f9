"""Lets a torchvision that was built for CUDA import beside a CPU torch.

Its extension cannot load there, and torchvision then dies while it registers fake kernels for operators that
nobody has declared. So they are declared just before its own code runs, and only where the extension really
cannot load. Image operations work, box operations do not. ci/envs.py puts this file and a .pth line into
engine environments.
"""

import importlib.machinery
import sys
from pathlib import Path

_kept = []  # a torch.library.Library takes its declarations back when it is collected


def _declare(folder):
    import torch

    for extension in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
            return
        except OSError:
            pass
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not spec.submodule_search_locations:
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            # Not in find_spec: asking whether torchvision is there must not import torch.
            _declare(Path(next(iter(spec.submodule_search_locations))))
            run(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder)
