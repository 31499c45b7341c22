"""Files in the format of CIFAR-10."""

import pickle
from pathlib import Path

import numpy as np


def write_cifar10(folder: Path, images: int) -> None:
    """Write six files as the authors of CIFAR-10 made them: protocol 2, byte keys, so many random images each."""
    target = folder / "cifar-10-batches-py"
    target.mkdir(parents=True)
    random = np.random.default_rng(0)
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        content = {
            b"batch_label": name.encode(),
            b"labels": [(k + i) % 10 for i in range(images)],
            b"data": random.integers(0, 256, (images, 3072), dtype=np.uint8),
            b"filenames": [f"{i}.png".encode() for i in range(images)],
        }
        (target / name).write_bytes(pickle.dumps(content, protocol=2))
