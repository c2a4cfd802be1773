"""A backend that finds every tile as negligible as every other, and remembers what it was asked."""

import torch

from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.tiles import TileShape

TILE = 16


class Recorder(ReferenceBackend):
    """Every tile gets the same ``score``: far below the threshold, whatever may be skipped is."""

    def __init__(self, score):
        super().__init__(TileShape(TILE, TILE))
        self.score = score
        self.calls = []

    def forward(self, call, lists=None, criterion=None):
        self.calls.append((call.q, lists))
        result = super().forward(call, lists, criterion)
        return result._replace(score=torch.full_like(result.score, self.score))
