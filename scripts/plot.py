"""
Plot the loss of one run, or of several side by side, over steps and seconds, and what Eva did in each layer:

    python scripts/plot.py runs/bert
    python scripts/plot.py runs/bert runs/bert-adamw --output comparison.svg

The same as `hf-eva plot`, for a checkout that is not installed.
"""

import sys

from hf_eva.cli import main

if __name__ == "__main__":
    sys.exit(main(["plot", *sys.argv[1:]]))
