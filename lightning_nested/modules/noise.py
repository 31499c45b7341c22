"""Random numbers that are a function of where the run is, so that a resumed run draws the same ones."""

from __future__ import annotations

import hashlib

import torch


def noise_generator(device: torch.device | str, *place: int | str) -> torch.Generator:
    """A generator seeded by a place such as ``(seed, rank, batch, "discriminator")``.

    Nothing has to be saved in a checkpoint, processes never draw the same numbers, and an extra evaluation
    does not shift what comes later.

    Example:
        >>> first, again = (torch.randn(2, generator=noise_generator("cpu", 0, 7, "z")) for _ in range(2))
        >>> bool(torch.equal(first, again))
        True
    """
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    # torch's CPU generator looks at the low 32 bits of a seed only: hence a hash, and no arithmetic.
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
