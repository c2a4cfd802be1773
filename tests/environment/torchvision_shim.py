"""Declares two operator schemas just before torchvision is imported.

torchvision's wheel for CUDA looks them up at import and fails beside a CPU build of torch. Started
by a ``.pth`` file that ``dev.py`` writes; see ``mend_torchvision`` there.
"""

import importlib.abc
import sys


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            _KEPT.append(self.library)
        return None


_KEPT: list = []
sys.meta_path.insert(0, _BeforeTorchvision())
