"""Whether the device still computes; a CUDA context that has failed once fails for the rest of its process."""

import torch


def device_works(device: str) -> bool:
    """Tell whether the device can be used after an unexpected error.

    Only to be called by the lane, between steps.
    """
    if not device.startswith("cuda"):
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:  # after an illegal access, every later call reports it again
        return False
    return True
