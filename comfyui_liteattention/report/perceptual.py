"""LPIPS, a learned distance between pictures, where its package and weights are installed.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018, in the
authors' package ``lpips``, with AlexNet. Nothing is installed or downloaded here: the network's
weights are read from where torchvision stores them, as tensors only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

#: Two frames ``[H, W, 3]``, 0..1 -> their distance; 0: equal.
Distance = Callable[[Tensor, Tensor], float]

WEIGHTS = "alexnet-owt-7be5be79.pth"
SMALLEST = 31  # pixels: of less the network leaves nothing


def lpips_distance() -> Distance | None:
    """The distance function, or None where it isn't available."""
    weights = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if find_spec("lpips") is None or not weights.is_file():
        return None
    try:
        import lpips

        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        known = torch.load(weights, map_location="cpu", weights_only=True)
        # lpips names a layer "slice2.3.weight" where torchvision has "features.3.weight".
        wanted = {name: f"features.{name.split('.', 1)[1]}" for name in model.net.state_dict()}
        model.net.load_state_dict({name: known[source] for name, source in wanted.items()})
    except Exception as error:  # someone else's package: whatever it raises, figures go on without
        log.warning("LiteAttention Compare: no LPIPS, since it could not be loaded: %s", error)
        return None

    def distance(a: Tensor, b: Tensor) -> float:
        x, y = (2 * t.float().cpu().permute(2, 0, 1)[None] - 1 for t in (a, b))
        with torch.no_grad():
            return float(model(x, y))

    return distance
