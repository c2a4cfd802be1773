"""Muon in float32: momentum whose matrix steps are orthogonalised by Newton-Schulz.

torch.optim.Muon iterates in bfloat16, which CPUs without bf16 instructions emulate slowly; here
matrices of equal shape are stacked and orthogonalised in one batched float32 product.

Reference: Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024);
the 0.2 sqrt(max(rows, columns)) scale, which gives steps the size of Adam's, is from
"Muon is Scalable for LLM Training", arXiv 2502.16982.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[B, R, C] -> nearest semi-orthogonal matrices (singular values about 0.7 to 1.2)."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum and orthogonalised steps, for 2-D weights of hidden layers."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                steps = orthogonalise(torch.stack([self._momentum(p, group) for p in params]))
                torch._foreach_add_(
                    params, list(steps), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5
                )

    def _momentum(self, p: torch.Tensor, group: dict) -> torch.Tensor:
        """Nesterov momentum of one parameter; its buffer lives in the optimiser's state."""
        state = self.state[p]
        assert p.grad is not None  # `step` passes on only those that have one
        if not state:
            state["momentum"] = torch.zeros_like(p)
        buffer = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
        return p.grad.lerp(buffer, group["momentum"])
