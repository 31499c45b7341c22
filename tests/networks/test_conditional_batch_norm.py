import pytest
import torch
from torch import nn

from lightning_nested.networks import ConditionalBatchNorm2d, Generator, standing_statistics
from lightning_nested.networks.conditional_batch_norm import ClassEmbedding, batch_norms


def layer(channels: int = 3) -> ConditionalBatchNorm2d:
    return ConditionalBatchNorm2d(
        channels, ClassEmbedding(10, channels), ClassEmbedding(10, channels)
    ).double()


def test_equals_a_loop_over_examples_and_channels() -> None:
    norm = layer()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    labels = torch.tensor([7, 0, 7, 2])
    expected = torch.empty_like(x)
    for c in range(3):
        values = x[:, c]
        normal = (values - values.mean()) / (values.var(unbiased=False) + 1e-5).sqrt()
        for n, label in enumerate(labels.tolist()):
            expected[n, c] = normal[n] * (1 + norm.gain.weight[label, c]) + norm.bias.weight[label, c]
    torch.testing.assert_close(norm(x, labels), expected, rtol=1e-12, atol=1e-12)
    # Running statistics: one step of momentum 0.1 from (0, 1), variance unbiased.
    torch.testing.assert_close(norm.norm.running_mean, 0.1 * x.mean(dim=(0, 2, 3)))
    unbiased = x.transpose(0, 1).flatten(1).var(dim=1)
    torch.testing.assert_close(norm.norm.running_var, 0.9 + 0.1 * unbiased)


def test_second_derivatives() -> None:
    norm = layer(2)
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 2])
    norm.norm.track_running_stats = False
    norm.norm.running_mean = norm.norm.running_var = None
    assert torch.autograd.gradgradcheck(lambda t: norm(t, labels), x)


def test_sync_batchnorm_converts_it() -> None:
    generator = Generator(2, 8)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(generator)
    kinds = {type(m).__name__ for m in converted.modules()}
    assert "SyncBatchNorm" in kinds
    assert "BatchNorm2d" not in kinds
    assert len(batch_norms(converted)) == 7  # two in each of three blocks, and the last


def test_standing_statistics_are_means_over_batches_with_the_present_weights() -> None:
    generator = Generator(2, 8)
    z = [torch.randn(6, 8) for _ in range(3)]
    labels = torch.arange(6)
    for code in z:
        generator(code, labels)
    generator.eval()
    vectors = {
        name: value.clone() for name, value in generator.named_buffers() if name.endswith((".u", ".v"))
    }
    running = generator.blocks[0].norm1.norm.running_mean.clone()
    batches = iter(z)
    standing_statistics(generator, lambda: generator(next(batches), labels), num_batches=3)
    first = generator.blocks[0].norm1.norm
    inputs = [generator.linear(code).view(6, -1, 4, 4) for code in z]
    expected = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs]).mean(dim=0)
    torch.testing.assert_close(first.running_mean, expected)
    assert not torch.allclose(first.running_mean, running)
    assert first.momentum == 0.1
    assert not generator.training
    for name, value in vectors.items():
        assert torch.equal(generator.get_buffer(name), value)


def test_standing_statistics_need_a_batch() -> None:
    with pytest.raises(ValueError, match="num_batches must be at least 1"):
        standing_statistics(nn.BatchNorm2d(1), lambda: None, num_batches=0)
