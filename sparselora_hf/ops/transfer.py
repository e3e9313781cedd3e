"""Host to device without waiting."""

import torch

__all__ = ["to_device"]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on a device, copied behind the host's back.

    From pageable memory a copy to CUDA waits for all that is queued on the device, `non_blocking` or not.
    """
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
