"""``python -m comfyui_liteattention doctor [--json]``."""

from __future__ import annotations

import argparse
import json
import sys

from .doctor import examine, render


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m comfyui_liteattention")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="say what was found, what is used, and why")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    findings = examine()
    sys.stdout.write(json.dumps(findings, indent=2) if options.json else render(findings))
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
