"""Tells each sample by its content alone, whatever its batch, order or process."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_keys(rows: Tensor, seed: int = 0) -> Tensor:
    """Hash each row's bits, so that a sample's fold depends on nothing but its content.

    Batch size, order and process do not matter then, and a sample that appears twice (augmentation,
    padding of a distributed sampler) is never held out from its own copy.

    Args:
        rows: Shape ``(n_samples, d)``.
        seed: Chooses the hash.

    Returns:
        Non-negative int64 keys, shape ``(n_samples,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    odd = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator) * 2 + 1
    odd = odd.to(rows.device)
    hashed = []
    # Few enough rows at once for the cache.
    for part in torch.split(rows, max(1, 2**16 // max(1, rows.shape[1]))):
        # Adding zero turns -0.0 into 0.0.
        bits = part.to(torch.float64, copy=True).add_(0.0).contiguous().view(torch.int64)
        # Round numbers differ in their leading bits only, which a product alone never carries downward.
        hashed.append(bits.bitwise_xor_(bits >> 32).mul_(odd).sum(dim=1))
    keys = torch.cat(hashed)
    for shift, factor in ((32, -7046029288634856825), (29, -4417276706812531889)):
        keys = (keys ^ (keys >> shift)) * factor
    return (keys >> 16) & (2**40 - 1)
