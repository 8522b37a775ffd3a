"""Describes a device from a process of its own: whoever asks CUDA holds memory of the device until it ends."""

import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from server.gpu_check.task import Device, write_json

_PACKAGES = ("diffusers", "transformers", "accelerate", "torchao")
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_DRIVER_TIMEOUT_SECONDS = 20.0


def describe_device(device: str) -> Device:
    """Look at a device.

    Args:
        device: as torch names it, such as `cpu` or `cuda:0`.
    """
    problem = _problem(device)
    if problem is not None:
        return Device(device, problem)
    versions = {"python": platform.python_version(), "torch": torch.__version__, **_packages()}
    if not device.startswith("cuda"):
        return Device(device, name=platform.processor() or platform.machine(), versions=versions)
    major, minor = torch.cuda.get_device_capability(device)
    versions |= {"driver": _driver(), "CUDA of torch": str(torch.version.cuda)}
    return Device(
        device,
        name=torch.cuda.get_device_name(device),
        total_bytes=torch.cuda.mem_get_info(device)[1],
        capability=f"{major}.{minor}",
        versions=versions,
    )


def _problem(device: str) -> str | None:
    try:
        parsed = torch.device(device)
    except RuntimeError:
        return f"{device} is no device; such as cuda:0 and cpu are"
    if parsed.type != "cuda":
        return None if parsed.type == "cpu" else f"{device} is no device of CUDA, and nothing else is measured"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no GPU with a driver that torch can use is here"
    if (parsed.index or 0) >= torch.cuda.device_count():
        return f"there is no {device}; torch sees {torch.cuda.device_count()}, counted from 0"
    return None


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:  # PackageNotFoundError is one
            continue
    return found


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is not None:
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(  # noqa: S603 - the command is ours
                command, capture_output=True, text=True, check=True, timeout=_DRIVER_TIMEOUT_SECONDS
            )
        except (OSError, subprocess.SubprocessError):
            pass
        else:
            return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "unknown"
    try:
        return _DRIVER_FILE.read_text().splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def main(device: str, result_file: Path) -> int:
    """Describe a device into a file."""
    write_json(result_file, asdict(describe_device(device)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
