"""What ComfyUI-Manager runs after cloning: looks and reports.

Installs nothing, starts nothing, and never fails the host.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    print("LiteAttention: nothing has to be compiled. This is what was found:")
    try:
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        from comfyui_liteattention.doctor import examine, render

        print(render(examine()))
    except Exception as error:  # the host must go on, whatever is missing here
        print(f"  could not look ({type(error).__name__}: {error}).")
        print("  The nodes still load; without a usable kernel, sampling runs as it did before.")


if __name__ == "__main__":
    main()
