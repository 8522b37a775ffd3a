"""Measure the models at full size, with random weights, on a GPU of this machine; no weights are needed.

`python scripts/gpu_check.py --json FILE --markdown FILE` measures every entry of models.yaml that names a source and
fits into the device by the memory plan; `--help` names the options. Without CUDA it says so in one line, having
measured nothing, and ends with status 3. Other statuses: 0 when all that fits was measured, 1 when something failed, 2
for arguments that cannot be used.
"""

import os
import sys

from server.errors import ConfigError
from server.settings import load_settings

# Set before the libraries that read it are imported: nothing here may reach for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

from server.gpu_check.command import check_gpu

# No store is used, so nobody needs its keys.
STORE = {"RESTAGE__STORE__ACCESS_KEY": "unused", "RESTAGE__STORE__SECRET_KEY": "unused"}


def main() -> int:
    """Measure with the registry of the settings."""
    try:
        return check_gpu(load_settings(env=STORE | os.environ), sys.argv[1:])
    except ConfigError as error:
        print(f"restage: the configuration cannot be used: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
