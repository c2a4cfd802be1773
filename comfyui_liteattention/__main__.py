"""``python -m comfyui_liteattention doctor [--json]``, ``... --version``."""

from __future__ import annotations

import argparse
import sys

from . import __version__


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m comfyui_liteattention")
    parser.add_argument("--version", action="version", version=f"LiteAttention {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="say what was found, what is used, and why")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if not options.json:
        # torch takes a while to be imported, and a kernel to be compiled and tested.
        sys.stdout.write(f"LiteAttention {__version__}: looking at this machine ...\n\n")
        sys.stdout.flush()
    from .doctor import report

    sys.stdout.write(report(as_json=options.json) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
