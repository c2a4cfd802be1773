"""How tiny transformers of diffusers are made so that there is something to skip, and sampled.

Weights are random, but queries and keys are made alike, and the left half of the video looks
different from the right half: so that halves need not see each other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from comfyui_liteattention.integrations.diffusers.families import FAMILIES, self_attention

GRID = (4, 8, 8)  # tokens: frames, rows, columns
VIDEO = 4 * 8 * 8
STEPS = 3
RESET = "_reset_stateful_cache"


class Made(NamedTuple):
    """One tiny model. ``sample()`` gives the result of one run. ``dense``: tokens that must never
    be skipped (text, given frames); ``streams``: names of the conditionings; ``kept``: tokens of
    each stream that are not padding; ``given``: where dense tokens lie among those that the
    model doesn't itself keep apart as text."""

    target: Any
    transformer: torch.nn.Module
    sample: Callable[[], torch.Tensor]
    dense: int
    streams: set[str]
    kept: set[int]
    layers: int = 2
    given: slice = slice(0, 0)


def latent(channels, scale=(1, 2, 2), frames=GRID[0]):
    """``[1, C, T, H, W]``: the left half of the picture is unlike the right half."""
    generator = torch.Generator().manual_seed(7)
    left, right = torch.randn(2, 1, channels, 1, 1, 1, generator=generator)
    sizes = (frames * scale[0], GRID[1] * scale[1], GRID[2] * scale[2])
    halves = torch.where(torch.arange(sizes[2]) < sizes[2] // 2, left, right)
    noise = torch.randn(1, channels, *sizes, generator=generator)
    return 3 * halves.expand(1, channels, *sizes) + 0.1 * noise


def tokens():
    """The latent of models that are given tokens ``[1, L, C]``."""
    return latent(4, (1, 1, 1)).flatten(2).transpose(1, 2)


def texts(*shape):
    """Two prompts' states ``shape`` each."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(5)).unbind()


def given_first_frame(t):
    """Noise levels ``[1, L]`` of tokens of which a frame is clean."""
    levels = t.repeat(1, VIDEO)
    levels[:, :64] = 0
    return levels


def sharpen(model, gain=1.4):
    """Make queries and keys similar for similar tokens, and different for different ones."""
    with torch.no_grad():
        for name in self_attention(model, FAMILIES[type(model).__name__]):
            module = model.get_submodule(name)
            q, k = (getattr(module, n, None) or getattr(module, a) for n, a in PROJECTIONS)
            k.load_state_dict(q.state_dict())
            norms = [getattr(module, n, None) for n in NORMS]
            for part in [n for n in norms if n is not None] or [q, k]:
                part.weight.mul_(gain)
        for parameter in model.parameters():
            if not parameter.any():  # modulations that begin at zero would hide the attention
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return model.eval()


PROJECTIONS = (("to_q", "to_query"), ("to_k", "to_key"))
NORMS = ("norm_q", "norm_k", "query_norm", "key_norm")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loop(model, start, step):
    """Sampling without a pipeline: ``step(latent, t)`` in [0, 1000] is the model's answer."""

    @torch.no_grad()
    def sample():
        x = start.clone()
        for t in (900.0, 600.0, 300.0):
            x = x - 0.1 * step(x, torch.tensor([t]))
        if hasattr(model, RESET):  # as a pipeline does at its end
            getattr(model, RESET)()
        return x

    return sample
