"""From host memory to the device while both go on working."""

import torch
from torch import Tensor


def upload(host: Tensor, device: torch.device | str) -> Tensor:
    """`host`, on the CPU, copied to `device`; on a CPU it is `host` itself.

    A GPU fetches by itself from pinned memory. From any other, the copy would wait for all that is queued before it.
    """
    device = torch.device(device)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
