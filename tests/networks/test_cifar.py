import pytest
import torch
from torch import nn

from lightning_nested.networks import CIFARAlexNet, CIFARResNet


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_sizes_are_those_of_the_papers() -> None:
    with torch.device("meta"):
        # ResNet-18 behind a 3×3 convolution. ResNet-44: the paper says 0.66 M.
        assert count(CIFARResNet()) == 11_173_962
        small = CIFARResNet(blocks=(7, 7, 7), width=16)
        assert sum(isinstance(m, nn.Conv2d) for m in small.modules()) == 1 + 2 * 3 * 7 + 2
        assert count(small) == 661_338
        # Five convolutions and three linear layers.
        assert count(CIFARAlexNet()) == 23_272_266


@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_one_of_each_kind_takes_images_of_other_sides_and_channels(channels: int) -> None:
    for network in (CIFARResNet(channels, 7, (1, 2), 2), CIFARAlexNet(channels, 7, 2, 8)):
        for side in (16, 28, 32):
            assert network(torch.zeros(2, channels, side, side)).shape == (2, 7)


def test_a_block_without_its_inside_is_its_shortcut() -> None:
    network = CIFARResNet(blocks=(1,), width=2)
    block = network.features[-1]
    nn.init.zeros_(block.norms[1].weight)  # type: ignore[union-attr, index]
    x = torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(block(x), x.relu())


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks must be at least 1\. Got .*0"):
        CIFARResNet(blocks=(2, 0))
    with pytest.raises(ValueError, match=r"hidden must be at least 1\. Got 0"):
        CIFARAlexNet(hidden=0)
