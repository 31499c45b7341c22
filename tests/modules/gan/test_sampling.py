import pytest
import torch

from lightning_nested.modules.gan.biggan_options import Sampling
from lightning_nested.modules.gan.sampling import interpolate, sample_images, seeded, truncated_normal
from lightning_nested.networks import Generator


def generator() -> Generator:
    network = Generator(2, 8, initialization="orthogonal")
    for _ in range(3):
        network(torch.randn(10, 8), torch.arange(10))
    return network


def test_truncation_is_the_conditional_distribution() -> None:
    z = truncated_normal(100_000, bound=1.0, generator=torch.Generator().manual_seed(0))
    assert z.abs().max() <= 1
    # Var = 1 − 2 φ(1)/(2Φ(1) − 1); the standard error of the estimate is below 1e-3.
    density = torch.exp(torch.tensor(-0.5)) / (2 * torch.pi) ** 0.5
    variance = 1 - 2 * density / torch.special.erf(torch.tensor(0.5**0.5))
    assert z.var().item() == pytest.approx(variance.item(), abs=5e-3)


@pytest.mark.parametrize("mode", ["running", "batch", "standing"])
def test_every_mode_leaves_the_network_as_it_was(mode: str) -> None:
    network = generator()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    sampling = Sampling(batch_norm=mode, batch_size=4, standing_batches=2)  # type: ignore[arg-type]
    images = sample_images(network, torch.arange(10), sampling, generator=seeded("cpu", 1))
    again = sample_images(network, torch.arange(10), sampling, generator=seeded("cpu", 1))
    assert torch.equal(images, again)
    assert not images.requires_grad
    assert network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_modes_are_what_they_are_called() -> None:
    network = generator()
    z, labels = torch.randn(6, 8), torch.arange(6)

    def images(mode: str) -> torch.Tensor:
        sampling = Sampling(batch_norm=mode, batch_size=6)  # type: ignore[arg-type]
        return sample_images(network, labels, sampling, generator=seeded("cpu", 1), z=z)

    running = images("running")
    batch = images("batch")
    standing = images("standing")
    network.eval()
    torch.testing.assert_close(running, network(z, labels))
    assert (running - batch).abs().max() > 1e-3
    assert (running - standing).abs().max() > 1e-3


def test_interpolation_ends_at_its_ends() -> None:
    network = generator()
    first, last = torch.randn(2, 8)
    found = interpolate(network, (first, 3), (last, 7), 5, Sampling(), generator=seeded("cpu", 0))
    network.eval()
    ends = network(torch.stack((first, last)), torch.tensor([3, 7]))
    assert found.shape == (5, 3, 32, 32)
    torch.testing.assert_close(found[[0, -1]], ends)
    with pytest.raises(ValueError, match="at least 2 steps"):
        interpolate(network, (first, 3), (last, 7), 1, Sampling(), generator=seeded("cpu", 0))
    with pytest.raises(ValueError, match=r"labels must lie in 0 … 9. Got 10"):
        interpolate(network, (first, 3), (last, 10), 3, Sampling(), generator=seeded("cpu", 0))


@pytest.mark.parametrize("shared_dim", [0, 6])
def test_guidance_moves_embeddings_away_from_their_mean(shared_dim: int) -> None:
    network = Generator(2, 8, initialization="orthogonal", shared_dim=shared_dim)
    z, labels = torch.randn(4, 8), torch.tensor([0, 3, 3, 9])
    found = sample_images(network, labels, Sampling(guidance=0.4), generator=seeded("cpu", 0), z=z)
    # Each class enters by tables of one row per class: the first ones it meets.
    for table in network.modules():
        if isinstance(table, torch.nn.Embedding):
            with torch.no_grad():
                table.weight += 0.4 * (table.weight - table.weight.mean(dim=0))
    network.eval()
    torch.testing.assert_close(found, network(z, labels), rtol=1e-4, atol=1e-5)
    plain = sample_images(network, labels, Sampling(), generator=seeded("cpu", 0), z=z)
    torch.testing.assert_close(plain, network(z, labels))


def test_standing_statistics_are_those_of_guided_samples() -> None:
    network, z = generator(), torch.randn(5, 8)
    found = [
        sample_images(network, torch.arange(5), sampling, generator=seeded("cpu", 0), z=z)
        for sampling in (
            Sampling(batch_norm="standing", standing_batches=2, guidance=2.0),
            Sampling(batch_norm="standing", standing_batches=2),
        )
    ]
    mixtures = torch.nn.functional.one_hot(torch.arange(5), 10) * 3.0 - 0.2
    unguided = Sampling(batch_norm="standing", standing_batches=2)
    other = sample_images(network, mixtures, unguided, generator=seeded("cpu", 0), z=z)
    assert (found[0] - other).abs().max() > 1e-3  # the same labels with statistics of plain samples
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_a_small_bound_is_as_good_as_any() -> None:
    z = truncated_normal(10_000, bound=0.04, generator=torch.Generator().manual_seed(0))
    assert z.abs().max() <= 0.04
    # Nearly uniform: the variance of a uniform number is bound²/3.
    assert z.var().item() == pytest.approx(0.04**2 / 3, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["running", "standing"])
def test_networks_of_another_precision(dtype: torch.dtype, mode: str) -> None:
    network, sampling = generator().to(dtype), Sampling(batch_norm=mode, standing_batches=2)  # type: ignore[arg-type]
    images = sample_images(network, torch.arange(3), sampling, generator=seeded("cpu", 1))
    assert images.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    mixed = interpolate(
        network, (torch.zeros(8), 0), (torch.ones(8), 1), 3, sampling, generator=seeded("cpu", 1)
    )
    assert mixed.dtype == images.dtype


@pytest.mark.parametrize("mode", ["running", "batch", "standing"])
def test_no_images_at_all(mode: str) -> None:
    sampling = Sampling(batch_norm=mode)  # type: ignore[arg-type]
    images = sample_images(generator(), torch.arange(0), sampling, generator=seeded("cpu", 1))
    assert images.shape == (0, 3, 32, 32)


@pytest.mark.parametrize("mode", ["batch", "standing"])
def test_synchronised_batch_norm_waits_for_nobody(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only process 0 draws a grid, and processes may make different numbers of batches."""
    network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(generator())
    sampling = Sampling(batch_norm=mode, standing_batches=2)  # type: ignore[arg-type]

    def images() -> torch.Tensor:
        return sample_images(network, torch.arange(3), sampling, generator=seeded("cpu", 1))

    expected = images()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    assert torch.equal(images(), expected)
    assert "forward" not in vars(network.norm)
    with pytest.raises(ValueError, match="expected input tensor to be on GPU"):  # in training it synchronises
        network(torch.zeros(2, 8), torch.arange(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": 0.0}, "truncation must be positive, or None"),
        ({"guidance": -0.1}, r"guidance must be at least 0\. Got -0\.1"),
        ({"batch_norm": "train"}, "'running', 'batch' or 'standing'"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)  # type: ignore[arg-type]
