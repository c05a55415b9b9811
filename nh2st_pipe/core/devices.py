"""Which device things run on."""

from __future__ import annotations

import torch

from nh2st_pipe.core.errors import EncoderError

__all__ = ["every_device", "pick_device", "pick_head_device"]


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is a GPU where there is one.

    Raises EncoderError where that device cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EncoderError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def pick_head_device(name: str) -> torch.device:
    """Return the device heads are trained on; Apple's MPS gives way to the CPU, for it has no float64."""
    device = pick_device(name)
    return torch.device("cpu") if device.type == "mps" else device


def every_device(name: str) -> list[str]:
    """Return the devices that several processes may take: those in `name`, parted by commas; "auto" is all GPUs."""
    if name == "auto" and torch.cuda.device_count() > 1:
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return name.split(",")
