"""``python -m liteattention``, as ``python -m comfyui_liteattention``."""

import sys

from comfyui_liteattention.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
