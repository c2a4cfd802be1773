"""The ComfyUI nodes, one file each."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .budget import LiteAttentionBudget
from .compare import LiteAttentionCompare
from .patch import LiteAttentionPatch
from .report import LiteAttentionReport
from .threshold import LiteAttentionThreshold


class LiteAttentionExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LiteAttentionPatch,
            LiteAttentionBudget,
            LiteAttentionThreshold,
            LiteAttentionReport,
            LiteAttentionCompare,
        ]
