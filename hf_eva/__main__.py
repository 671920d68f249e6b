"""`python -m hf_eva SCRIPT [arguments]` runs an unmodified script of transformers that then knows `--optim eva`."""

from __future__ import annotations

import os
import runpy
import sys

from .registration import register

USAGE = (
    "usage: python -m hf_eva SCRIPT [arguments of the script], for example: python -m hf_eva run_glue.py --optim eva"
)


def main() -> int:
    """Register Eva, then run the script as `python SCRIPT` would: its arguments, its folder, its exit code."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE, file=sys.stderr if len(sys.argv) < 2 else sys.stdout)
        return 2 if len(sys.argv) < 2 else 0
    script = sys.argv[1]
    if not os.path.isfile(script):
        print(f"hf_eva: {script} is not a file; {USAGE}", file=sys.stderr)
        return 2
    register()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # python -m has put the current folder there
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
