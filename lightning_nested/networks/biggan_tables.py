"""Which blocks a BigGAN has at each resolution. Widths are multiples of the base width."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GeneratorTable:
    """Input and output width of each block; every block doubles the side, which starts at 4."""

    widths: tuple[int, ...]  # one more than there are blocks

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of each block's output."""
        return tuple(4 * 2 ** (block + 1) for block in range(len(self.widths) - 1))


@dataclass(frozen=True, kw_only=True)
class DiscriminatorTable:
    """Output width of each block, and which of them halve the side."""

    widths: tuple[int, ...]
    downsample: tuple[bool, ...]

    def sides(self, resolution: int) -> tuple[int, ...]:
        """Side of each block's output."""
        sides, side = [], resolution
        for down in self.downsample:
            side //= 1 + down
            sides.append(side)
        return tuple(sides)


GENERATORS: dict[int, GeneratorTable] = {
    32: GeneratorTable(widths=(4, 4, 4, 4)),
    64: GeneratorTable(widths=(16, 16, 8, 4, 2)),
    128: GeneratorTable(widths=(16, 16, 8, 4, 2, 1)),
    256: GeneratorTable(widths=(16, 16, 8, 8, 4, 2, 1)),
}
DISCRIMINATORS: dict[int, DiscriminatorTable] = {
    32: DiscriminatorTable(widths=(4, 4, 4, 4), downsample=(True, True, False, False)),
    64: DiscriminatorTable(widths=(1, 2, 4, 8, 16), downsample=(True,) * 4 + (False,)),
    128: DiscriminatorTable(widths=(1, 2, 4, 8, 16, 16), downsample=(True,) * 5 + (False,)),
    256: DiscriminatorTable(widths=(1, 2, 4, 8, 8, 16, 16), downsample=(True,) * 6 + (False,)),
}


def check_resolution(resolution: int) -> None:
    """Raise ValueError for a resolution without a table."""
    if resolution not in GENERATORS:
        raise ValueError(
            f"resolution must be one of {', '.join(map(str, GENERATORS))}. Got {resolution}. "
            "Resize or pad the images to the next of them."
        )
