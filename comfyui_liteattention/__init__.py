"""LiteAttention: video diffusion that skips the attention tiles that don't matter.

arXiv 2511.11062, rebuilt for ComfyUI and diffusers. Importing this package is cheap and touches
neither a GPU nor a host application.
"""

from .settings import SAFEST, Settings

__all__ = ["SAFEST", "Settings"]
__version__ = "0.1.0"
