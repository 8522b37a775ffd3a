"""Write the tiny twins' weights: `python scripts/make_tiny_weights.py [--out weights]`."""

import argparse
import os
from pathlib import Path


def main() -> None:
    """Make what is missing and say where it lies."""
    parser = argparse.ArgumentParser(description="Write the tiny twins' random weights; those that exist are kept.")
    parser.add_argument("--out", type=Path, default=Path("weights"), help="folder of all weights (default: weights)")
    out = parser.parse_args().out
    # Set before the libraries that read it are imported: nothing here may reach for a network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from pipelines.tiny import make_tiny_weights  # noqa: PLC0415

    for folder in make_tiny_weights(out):
        print(folder)


if __name__ == "__main__":
    main()
