"""Whether a device is there, asked before weights are read."""

import torch


def check_device(device: str) -> None:
    """Raise ValueError, with torch's reason, unless a tensor can be put there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without it
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]} Without a GPU: cpu.") from error
