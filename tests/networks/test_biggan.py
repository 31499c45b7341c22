import pytest
import torch
from torch import nn

from lightning_nested.networks import (
    Discriminator,
    Generator,
    SpectralNormConv2d,
    frozen_power_iteration,
    singular_values,
)
from lightning_nested.networks.biggan.discriminator import class_deviation
from lightning_nested.networks.biggan.tables import GENERATORS
from lightning_nested.networks.spectral_norm import spectral_norm_layers


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("width", "latent_dim", "generator", "discriminator"),
    [
        (64, 128, 4_304_387, 4_207_361),
        (16, 32, 277_379, 265_409),
        (4, 16, 21_475, 17_201),
        (2, 8, 6_067, 4_505),
    ],
)
def test_parameter_counts_of_the_reference(
    width: int, latent_dim: int, generator: int, discriminator: int
) -> None:
    assert count(Generator(width, latent_dim)) == generator
    assert count(Discriminator(width)) == discriminator


def test_parameter_counts_published_for_imagenet() -> None:
    """128 px, width 96: those of the authors' PyTorch code and of compare_gan's TensorFlow one."""
    with torch.device("meta"):
        generator = Generator(96, 120, 1000, 128, attention=(64,), shared_dim=128, hierarchical=True)
        discriminator = Discriminator(96, 1000, 128, attention=(64,))
    assert count(generator) == 70_433_988
    assert count(discriminator) == 87_982_370


@pytest.mark.parametrize("resolution", [64, 128, 256])
def test_forward_and_backward_at_every_resolution(resolution: int) -> None:
    blocks = len(GENERATORS[resolution]) - 1
    # The attention of the authors' configurations.
    generator = Generator(
        1, blocks + 1, 5, resolution, attention=(64,), shared_dim=3, hierarchical=True, initialization="orthogonal"
    )  # fmt: skip
    discriminator = Discriminator(1, 5, resolution, attention=(32,), initialization="orthogonal")
    for module in (generator, discriminator):
        assert len(module.attention) == 1
        for layer in module.attention.values():
            nn.init.ones_(layer.gamma)  # from 0 nothing behind it has a gradient
    labels = torch.tensor([0, 4])
    score = discriminator(generator(torch.randn(2, generator.latent_dim), labels), labels).sum()
    for module in (generator, discriminator):
        gradients = torch.autograd.grad(score, list(module.parameters()), retain_graph=True)
        assert all(g.isfinite().all() for g in gradients)
        # Every block is on the way: its weights have a gradient.
        moved = {
            name.split(".")[1]
            for (name, _), g in zip(module.named_parameters(), gradients, strict=True)
            if name.startswith("blocks.") and name.endswith("conv1.weight") and g.abs().sum() > 0
        }
        assert moved == {str(k) for k in range(len(module.blocks))}


@pytest.mark.parametrize("resolution", list(GENERATORS))
def test_forward_shapes_with_every_option(resolution: int) -> None:
    blocks = len(GENERATORS[resolution]) - 1
    generator = Generator(
        2,
        4 * (blocks + 1),
        7,
        resolution,
        attention=(16,),
        shared_dim=5,
        hierarchical=True,
        initialization="orthogonal",
    )
    discriminator = Discriminator(2, 7, resolution, attention=(8,), initialization="orthogonal")
    labels = torch.tensor([0, 6])
    images = generator(torch.randn(2, generator.latent_dim), labels)
    assert images.shape == (2, 3, resolution, resolution)
    assert images.abs().max() <= 1
    assert discriminator(images, labels).shape == (2,)


def test_every_parameter_has_a_gradient() -> None:
    generator = Generator(2, 16, attention=(8,), shared_dim=3, hierarchical=True)
    discriminator = Discriminator(2, attention=(8,))
    for module in (generator, discriminator):
        for layer in module.attention.values():
            nn.init.ones_(layer.gamma)
    labels = torch.arange(10)
    score = discriminator(generator(torch.randn(10, 16), labels), labels).sum()
    for module in (generator, discriminator):
        gradients = torch.autograd.grad(score, list(module.parameters()), retain_graph=True)
        assert all(g.abs().sum() > 0 or g.shape == (1,) for g in gradients)


def test_shortcuts_equal_the_reference_order() -> None:
    """The reference up-samples before and pools after the 1×1 convolution; both commute with it."""
    generator, discriminator = Generator(2, 8).double().eval(), Discriminator(2).double().eval()
    block = generator.blocks[0]
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    ours = nn.functional.interpolate(block.shortcut(x), scale_factor=2)
    torch.testing.assert_close(ours, block.shortcut(nn.functional.interpolate(x, scale_factor=2)))
    down = discriminator.blocks[1]
    h = down.conv2(torch.relu(down.conv1(torch.relu(x))))
    theirs = nn.functional.avg_pool2d(h, 2) + nn.functional.avg_pool2d(down.shortcut(x), 2)
    torch.testing.assert_close(down(x), theirs)


def reference_generator(generator: Generator, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The generator in plain functions, one example at a time, from its state and weights over the true σ."""

    def weight(layer: nn.Module) -> torch.Tensor:
        matrix = layer.weight.flatten(1)
        return layer.weight / (layer.u @ matrix @ layer.v)

    def norm(x: torch.Tensor, layer: nn.Module, label: int) -> torch.Tensor:
        mean, var = layer.norm.running_mean, layer.norm.running_var
        out = torch.empty_like(x)
        for c in range(x.shape[1]):
            normal = (x[:, c] - mean[c]) / (var[c] + 1e-5).sqrt()
            out[:, c] = normal * (1 + layer.gain.weight[label, c]) + layer.bias.weight[label, c]
        return out

    def up(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    conv = nn.functional.conv2d
    images = []
    for code, label in zip(z, labels.tolist(), strict=True):
        h = (weight(generator.linear) @ code + generator.linear.bias).view(1, -1, 4, 4)
        for block in generator.blocks:
            x = up(torch.relu(norm(h, block.norm1, label)))
            x = conv(x, weight(block.conv1), block.conv1.bias, padding=1)
            x = torch.relu(norm(x, block.norm2, label))
            x = conv(x, weight(block.conv2), block.conv2.bias, padding=1)
            h = x + conv(up(h), weight(block.shortcut), block.shortcut.bias)
        last = generator.norm
        h = nn.functional.batch_norm(h, last.running_mean, last.running_var, last.weight, last.bias)
        images.append(torch.tanh(conv(torch.relu(h), weight(generator.conv), generator.conv.bias, padding=1)))
    return torch.cat(images)


def test_the_generator_equals_an_independent_one() -> None:
    generator = Generator(2, 8, initialization="orthogonal").double()
    z, labels = torch.randn(4, 8, dtype=torch.float64), torch.tensor([3, 0, 9, 3])
    for _ in range(3):
        generator(z, labels)  # moves running statistics and spectral vectors
    generator.eval()
    torch.testing.assert_close(
        generator(z, labels), reference_generator(generator, z, labels), rtol=1e-10, atol=1e-12
    )


def test_mixtures_of_classes() -> None:
    generator = Generator(2, 8).eval()
    z, labels = torch.randn(2, 8), torch.tensor([1, 4])
    one_hot = nn.functional.one_hot(labels, 10).float()
    torch.testing.assert_close(generator(z, labels), generator(z, one_hot))
    with pytest.raises(ValueError, match=r"shape \(N, 10\)"):
        generator(z, one_hot[:, :5])


def test_channels_last_computes_the_same() -> None:
    for module, inputs in (
        (Generator(2, 8), torch.randn(3, 8)),
        (Discriminator(2), torch.randn(3, 3, 32, 32)),
    ):
        module.eval()
        labels = torch.tensor([0, 1, 2])
        plain = module(inputs, labels)
        module.to(memory_format=torch.channels_last)
        if inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(module(inputs, labels), plain)


def test_attention_starts_as_the_identity_and_equals_its_formula() -> None:
    from lightning_nested.networks.biggan.blocks import SelfAttention

    layer = SelfAttention(16).eval()
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(layer(x), x)
    nn.init.constant_(layer.gamma, 0.5)
    theta, phi, g = (f(x) for f in (layer.theta, layer.phi, layer.g))
    phi, g = (nn.functional.max_pool2d(t, 2) for t in (phi, g))
    read = torch.zeros(2, 8, 8, 8)
    for n in range(2):
        for i in range(8):
            for j in range(8):
                logits = torch.einsum("c,chw->hw", theta[n, :, i, j], phi[n])
                weights = logits.flatten().softmax(0).view(4, 4)
                read[n, :, i, j] = torch.einsum("hw,chw->c", weights, g[n])
    torch.testing.assert_close(layer(x), x + 0.5 * layer.o(read))


def test_second_derivatives_of_the_whole_discriminator() -> None:
    discriminator = Discriminator(1, attention=(8,)).double()
    nn.init.ones_(discriminator.attention["1"].gamma)
    labels = torch.tensor([2])
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    direction = torch.randn_like(x)

    def slope(t: torch.Tensor) -> torch.Tensor:
        with frozen_power_iteration(discriminator):
            return discriminator(x + t * direction, labels).tanh().sum()

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(slope(t), t, create_graph=True)
    weight = discriminator.blocks[0].conv1.weight
    (mixed,) = torch.autograd.grad(first, weight)
    step = torch.zeros_like(weight)
    step[0, 0, 0, 0] = h = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step)
        (moved,) = torch.autograd.grad(slope(t), t)
        values.append(moved)
        with torch.no_grad():
            weight.sub_(sign * step)
    # Central differences: error about h² plus rounding 1e-16/h.
    torch.testing.assert_close(mixed[0, 0, 0, 0], (values[0] - values[1]) / (2 * h), rtol=1e-5, atol=1e-8)


def test_singular_values_are_found_for_every_layer() -> None:
    discriminator = Discriminator(2)
    labels, images = torch.tensor([0]), torch.zeros(1, 3, 32, 32)
    for _ in range(200):
        discriminator(images, labels)
    found = singular_values(discriminator)
    assert set(found) == set(spectral_norm_layers(discriminator))
    for name, value in found.items():
        layer = discriminator.get_submodule(name)
        exact = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2)
        torch.testing.assert_close(value, exact, rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Generator(resolution=48), "resolution must be one of 32, 64, 128, 256. Got 48"),
        (lambda: Discriminator(resolution=28), "Resize or pad"),
        (lambda: Generator(width=0), "width.*must be at least 1"),
        (lambda: Generator(attention=(64,)), r"attention must name sides.*\[8, 16, 32\]. Got \[64\]"),
        (lambda: Discriminator(attention=(32,)), "attention must name sides"),
        (lambda: Generator(hierarchical=True), "shared_dim >= 1"),
        (lambda: Generator(shared_dim=8, latent_dim=30, hierarchical=True), "take latent_dim=28"),
        (lambda: Generator(initialization="xavier"), "'normal' or 'orthogonal'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_sizes(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


@pytest.mark.parametrize("label", [-1, 10])
def test_a_class_that_does_not_exist(label: int) -> None:
    labels = torch.tensor([0, label])
    with pytest.raises(ValueError, match=rf"labels must lie in 0 … 9. Got {label}"):
        Generator(2, 8)(torch.zeros(2, 8), labels)
    with pytest.raises(ValueError, match="Set num_classes"):
        Discriminator(2)(torch.zeros(2, 3, 32, 32), labels)


def test_images_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(N, 3, 32, 32\). Got \(2, 1, 28, 28\)"):
        Discriminator(2)(torch.zeros(2, 1, 28, 28), torch.tensor([0, 1]))


def test_initialisation() -> None:
    normal = Generator(16).blocks[0].conv1.weight
    assert abs(float(normal.detach().std()) - 0.02) < 0.001
    orthogonal = Discriminator(4, initialization="orthogonal").blocks[2].conv1.weight.detach().flatten(1)
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(16), atol=1e-5, rtol=0)
    generator = Generator(16, initialization="orthogonal")
    assert all(not layer.bias.any() for layer in generator.modules() if isinstance(layer, nn.Conv2d))
    assert abs(float(generator.blocks[0].norm1.gain.weight.detach().std()) - 0.02) < 0.002
    # Spectral vectors belong to the initialised weights: an evaluation before training is already normalised.
    layer = SpectralNormConv2d(3, 8, 3)
    torch.testing.assert_close(
        layer.v, nn.functional.normalize(layer.weight.detach().flatten(1).T @ layer.u, dim=0)
    )


def test_the_deviation_within_a_class(generator: torch.Generator) -> None:
    features, labels = torch.randn(9, 4, generator=generator), torch.tensor([0, 1, 0, 2, 1, 0, 0, 3, 3])
    found = class_deviation(features, labels)
    for i in range(9):
        others = [j for j in range(9) if j != i and labels[j] == labels[i]]
        expected = torch.stack([(features[i] - features[j]).abs() for j in others] or [torch.zeros(4)]).mean(
            0
        )
        torch.testing.assert_close(found[i], expected)


def test_a_discriminator_that_compares_sees_images_that_are_alike(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    network = Discriminator(2, 10, image_channels=1, minibatch_group=4).eval()
    images, labels = torch.randn(8, 1, 32, 32, generator=generator), torch.arange(8) // 2
    scores = network(images, labels)
    # Groups of successive examples: what is in one changes nothing in another.
    changed = torch.cat([images[:4], images[:1].expand(4, -1, -1, -1)])
    torch.testing.assert_close(network(changed, labels)[:4], scores[:4])
    # Of two images of one class that are the same, each loses what it had from their difference.
    alone = Discriminator(2, 10, image_channels=1)
    assert set(network.state_dict()) - set(alone.state_dict()) == {
        "comparison.weight", "comparison.u", "comparison.v"
    }  # fmt: skip
    alone.load_state_dict(network.state_dict(), strict=False)
    torch.testing.assert_close(network(changed, labels)[4:], alone.eval()(changed, labels)[4:])
    assert not torch.allclose(scores, alone(images, labels))


def test_groups_of_a_negative_size() -> None:
    with pytest.raises(ValueError, match="minibatch_group must be at least 0"):
        Discriminator(2, minibatch_group=-1)


def test_groups_that_would_reach_into_another_batch() -> None:
    network = Discriminator(2, 10, image_channels=1, minibatch_group=4)
    with pytest.raises(ValueError, match="must be a multiple of minibatch_group=4"):
        network(torch.zeros(6, 1, 32, 32), torch.zeros(6, dtype=torch.long))
