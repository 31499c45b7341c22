"""The zoo: payoffs, Jacobians and spectra against the reference values, by an independent computation each."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from lightning_nested.games import (
    Bilinear,
    DiracGAN,
    Game,
    GaussiansGAN,
    IteratedPrisonersDilemma,
    MatchingPennies,
    PenniesAndDilemma,
    QuadraticGame,
    RandomSubspace,
    SmallIPD,
    high_quality,
    modes_covered,
    policy_losses,
    ring,
)
from tests.conftest import Normal

DOUBLE = torch.float64
TFT, DEFECT, HALF = (torch.tensor(p, dtype=DOUBLE) for p in ([1, 1, 0, 1, 0], [0.0] * 5, [0.5] * 5))
ZOO: dict[str, Game] = {
    "quadratic": QuadraticGame.mixture(3, 1.0, torch.Generator().manual_seed(0)),
    "bilinear": Bilinear(torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)),
    "dirac": DiracGAN(0.3),
    "pennies": MatchingPennies(),
    "ipd": IteratedPrisonersDilemma(),
    "small ipd": SmallIPD(),
    "mixed": PenniesAndDilemma(0.25),
    "subspace": RandomSubspace(IteratedPrisonersDilemma(), dim=2),
    "gaussians": GaussiansGAN(hidden=(4,), noise_dim=2, batch_size=8),
}


def logit(p: float) -> Tensor:
    return torch.tensor([math.log(p / (1 - p))], dtype=DOUBLE)


def jacobian(game: Game, *players: Tensor) -> Tensor:
    """Jacobian of the joint gradient from autograd's Hessian of each loss, row block by row block."""
    rows = []
    for i in range(len(players)):
        hessian = torch.autograd.functional.hessian(lambda *p, i=i: game.losses(p)[i], players)
        rows.append(torch.cat(hessian[i], dim=1))
    return torch.cat(rows)


def by_imaginary(values: Tensor) -> list[complex]:
    return sorted(values.to(torch.complex128).tolist(), key=lambda z: (round(z.imag, 9), z.real))


class TestEveryGame:
    @pytest.mark.parametrize("name", ZOO)
    def test_takes_its_initial_players(self, name: str, generator: torch.Generator) -> None:
        game = ZOO[name]
        for dtype in (torch.float64, torch.float32):
            players = game.initial(generator, dtype=dtype)
            assert tuple(p.numel() for p in players) == game.sizes
            assert all(p.is_leaf and p.requires_grad and p.dtype == dtype for p in players)
            losses = game.losses(players)
            assert len(losses) == len(players) == len(game.names)
            for loss, player in zip(losses, players, strict=True):
                assert loss.shape == ()
                assert loss.dtype == dtype
                (gradient,) = torch.autograd.grad(loss, player, retain_graph=True)
                assert torch.isfinite(gradient).all()
                assert gradient.abs().max() > 0

    @pytest.mark.parametrize("name", ZOO)
    def test_same_generator_same_players(self, name: str) -> None:
        first, second = (ZOO[name].initial(torch.Generator().manual_seed(7)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("name", ZOO)
    def test_refuses_players_that_do_not_fit(self, name: str) -> None:
        game = ZOO[name]
        players = game.initial()
        for wrong in (players[:1], (players[0], players[1][None]), (*players, players[0])):
            with pytest.raises(ValueError, match=r"must be tensors of shapes .* Got .*initial"):
                game.losses(wrong)


class TestQuadratic:
    def test_jacobian_is_the_second_derivative(self, normal: Normal) -> None:
        a, b, c = normal(3, 3), normal(3, 2), normal(2, 2)
        game = QuadraticGame(a + a.mT, b, c + c.mT)
        torch.testing.assert_close(
            game.jacobian(), jacobian(game, normal(3), normal(2)), rtol=1e-13, atol=1e-13
        )
        assert by_imaginary(game.eigenvalues()) == pytest.approx(
            by_imaginary(torch.linalg.eigvals(game.jacobian())), abs=1e-12
        )

    def test_eigenvalues_of_diagonals_in_closed_form(self, normal: Normal) -> None:
        game = QuadraticGame(normal(6), normal(6), normal(6))
        dense = torch.linalg.eigvals(game.jacobian())
        assert by_imaginary(game.eigenvalues()) == pytest.approx(by_imaginary(dense), abs=1e-12)

    def test_from_eigenvalues(self) -> None:
        game = QuadraticGame.from_eigenvalues([0.5 + 1j, 0.25])
        assert by_imaginary(game.eigenvalues()) == pytest.approx([0.5 - 1j, 0.25, 0.25, 0.5 + 1j])

    def test_mixture_goes_from_cooperative_to_adversarial(self, generator: torch.Generator) -> None:
        cooperative = QuadraticGame.mixture(50, 0.0, generator).eigenvalues()
        assert cooperative.imag.abs().max() == 0
        mixed = QuadraticGame.mixture(50, 1.0, generator).eigenvalues()
        angle = mixed.angle().abs()
        assert angle.min() < 0.2
        assert angle.max() > 1.2
        assert mixed.real.min() > 0

    @pytest.mark.parametrize(("rows", "columns"), [(2, 3), (3, 2), (2, 2)])
    def test_bilinear(self, rows: int, columns: int, normal: Normal) -> None:
        matrix = normal(rows, columns)
        game = Bilinear(matrix)
        x, y = normal(rows), normal(columns)
        first, second = game.losses((x, y))
        assert float(first) == pytest.approx(float(x @ matrix @ y))
        assert float(second) == -float(first)
        assert by_imaginary(game.eigenvalues()) == pytest.approx(
            by_imaginary(torch.linalg.eigvals(jacobian(game, x, y))), abs=1e-12
        )

    def test_bilinear_takes_a_vector_and_a_number(self) -> None:
        assert Bilinear(torch.tensor(2.0)).sizes == (1, 1)
        assert Bilinear(torch.tensor([2.0, 1.0])).sizes == (1, 2)
        assert by_imaginary(Bilinear().eigenvalues()) == [-1j, 1j]

    def test_refuses(self) -> None:
        one, matrix = torch.ones(2), torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        with pytest.raises(ValueError, match=r"shapes \(2, 2\) and \(2, 2\)\. Got \(3, 3\)"):
            QuadraticGame(torch.ones(3), one, one)
        with pytest.raises(ValueError, match=r"first must be symmetric\. Got an asymmetry of 2"):
            QuadraticGame(matrix, one, one)
        for adversarial in (-0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match=r"adversarial must lie in \[0, 1\]"):
                QuadraticGame.mixture(2, adversarial)
        with pytest.raises(ValueError, match="size must be at least 1"):
            QuadraticGame.mixture(0, 0.5)


class TestDiracGAN:
    @pytest.mark.parametrize("penalty", [0.0, 0.3, 1.0, 2.0])
    def test_eigenvalues_at_the_solution(self, penalty: float) -> None:
        game, zero = DiracGAN(penalty), torch.zeros(1, dtype=DOUBLE)
        found = jacobian(game, zero, zero)
        torch.testing.assert_close(found, torch.tensor([[penalty, 0.5], [-0.5, 0.0]], dtype=DOUBLE))
        # At penalty 1 the eigenvalue is double, so its rounding error is a square root.
        expected = by_imaginary(torch.linalg.eigvals(found))
        assert by_imaginary(game.eigenvalues()) == pytest.approx(expected, abs=1e-7)
        if penalty == 0:
            assert by_imaginary(game.eigenvalues()) == [-0.5j, 0.5j]

    def test_losses(self) -> None:
        psi, theta = (torch.tensor([v], dtype=DOUBLE) for v in (1.5, -0.7))
        discriminator, generator = DiracGAN(2.0).losses((psi, theta))
        fooled = -math.log(1 + math.exp(1.5 * -0.7))
        assert float(generator) == pytest.approx(fooled)
        assert float(discriminator) == pytest.approx(math.log(2) - fooled + 1.5**2)

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"penalty must be non-negative\. Got -1"):
            DiracGAN(-1)


class TestIteratedGames:
    @pytest.mark.parametrize(
        ("first", "second", "losses"),
        [
            (TFT, TFT, (1.0, 1.0)),
            (DEFECT, DEFECT, (2.0, 2.0)),
            (TFT, DEFECT, (2.04, 1.92)),
            (DEFECT, TFT, (1.92, 2.04)),
            (HALF, HALF, (1.5, 1.5)),
        ],
    )
    def test_dilemma(self, first: Tensor, second: Tensor, losses: tuple[float, float]) -> None:
        assert [float(x) for x in policy_losses(first, second, 0.96)] == pytest.approx(losses, abs=1e-13)

    def test_dilemma_is_the_discounted_mean_of_play(self, normal: Normal) -> None:
        p, q = torch.sigmoid(normal(5)), torch.sigmoid(normal(5))
        state = torch.tensor(
            [1.0, 0, 0, 0, 0], dtype=DOUBLE
        )  # start, CC, CD, DC, DD as the first player sees them
        totals, weight = [0.0, 0.0], 1 - 0.96
        for _ in range(1200):  # 0.96¹²⁰⁰ = 5e-22
            after = torch.zeros(5, dtype=DOUBLE)
            for s, swapped in enumerate((0, 1, 3, 2, 4)):
                a, b = p[s], q[swapped]
                after[1:] += state[s] * torch.stack([a * b, a * (1 - b), (1 - a) * b, (1 - a) * (1 - b)])
            state = after
            totals[0] += weight * float(state[1] * 1 + state[2] * 3 + state[4] * 2)
            totals[1] += weight * float(state[1] * 1 + state[3] * 3 + state[4] * 2)
            weight *= 0.96
        assert [float(x) for x in policy_losses(p, q, 0.96)] == pytest.approx(totals, rel=1e-12)

    def test_dilemma_reads_logits(self, normal: Normal) -> None:
        players = (normal(5), normal(5))
        expected = policy_losses(*(torch.sigmoid(x) for x in players), 0.96)
        assert IteratedPrisonersDilemma().losses(players) == expected

    @pytest.mark.parametrize(
        ("first", "second", "losses"),
        [
            (1.0, 1.0, (1.0, 1.0)),
            (0.0, 0.0, (1.9590640, 1.9590640)),
            (1.0, 0.0, (2.1023451, 1.6894059)),
            (0.5, 0.5, (1.8436209, 1.8436209)),
        ],
    )
    def test_small_dilemma(self, first: float, second: float, losses: tuple[float, float]) -> None:
        p, q = (torch.tensor([x], dtype=DOUBLE) for x in (first, second))
        found = [float(x) for x in SmallIPD().probability_losses(p, q)]
        assert found == pytest.approx(losses, abs=5e-8)
        if 0 < first < 1:
            assert [float(x) for x in SmallIPD().losses((logit(first), logit(second)))] == pytest.approx(
                found
            )

    def test_small_dilemma_has_a_saddle_on_the_diagonal(self) -> None:
        game = SmallIPD()

        def slope(at: float) -> float:
            x, y = (torch.tensor([at], dtype=DOUBLE, requires_grad=i == 0) for i in (0, 1))
            return float(torch.autograd.grad(game.losses((x, y))[0], x)[0])

        root = brentq(slope, 0.0, 1.0, xtol=1e-12)
        assert root == pytest.approx(0.4179033, abs=5e-8)
        point = torch.tensor([root], dtype=DOUBLE)
        found = jacobian(game, point, point)
        expected = torch.tensor([[0.0, -0.03925], [-0.03925, 0.0]], dtype=DOUBLE)
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
        eigenvalues = torch.linalg.eigvals(found).real
        assert eigenvalues.min() < 0 < eigenvalues.max()

    def test_pennies(self) -> None:
        for p, q, first in ((0.75, 0.75, -0.25), (0.75, 0.25, 0.25), (0.5, 0.9, 0.0)):
            losses = [float(x) for x in MatchingPennies().losses((logit(p), logit(q)))]
            assert losses == pytest.approx([first, -first])
        zero = torch.zeros(1, dtype=DOUBLE)
        found = jacobian(MatchingPennies(), zero, zero)
        assert torch.equal(found, torch.tensor([[0.0, -0.25], [0.25, 0.0]], dtype=DOUBLE))
        step = torch.linalg.eigvals(torch.eye(2, dtype=DOUBLE) - 0.1 * found).abs().log()
        assert step.tolist() == pytest.approx([0.5 * math.log1p(0.1**2 / 16)] * 2, rel=1e-12)

    def test_mix_is_the_weighted_mean(self, normal: Normal) -> None:
        players = (normal(1), normal(1))
        years, coins = SmallIPD().losses(players), MatchingPennies().losses(players)
        for share in (0.0, 0.3, 1.0):
            mixed = PenniesAndDilemma(share).losses(players)
            for m, a, b in zip(mixed, years, coins, strict=True):
                assert float(m) == pytest.approx(share * float(a) + (1 - share) * float(b))

    def test_refuses(self) -> None:
        for discount in (0.0, 1.0, -0.5, math.nan):
            with pytest.raises(ValueError, match="discount must be"):
                IteratedPrisonersDilemma(discount)
            with pytest.raises(ValueError, match="discount must be"):
                SmallIPD(discount)
        with pytest.raises(ValueError, match=r"share must lie in \[0, 1\]\. Got 1\.5"):
            PenniesAndDilemma(1.5)


class TestRandomSubspace:
    def test_is_a_cut_through_the_game(self, normal: Normal) -> None:
        game = IteratedPrisonersDilemma()
        cut = RandomSubspace(game, dim=2, generator=torch.Generator().manual_seed(3))
        players = (normal(2), normal(2))
        whole = tuple(p @ z + b for p, z, b in zip(cut.projections, players, cut.offsets, strict=True))
        assert cut.losses(players) == game.losses(whole)
        again = RandomSubspace(game, dim=2, generator=torch.Generator().manual_seed(3))
        assert again.losses(players) == cut.losses(players)

    def test_refuses(self) -> None:
        for dim in (0, 6):
            with pytest.raises(ValueError, match=rf"dim must lie between 1 and .* 5\. Got {dim}"):
                RandomSubspace(IteratedPrisonersDilemma(), dim=dim)
        with pytest.raises(ValueError, match="spread must be non-negative"):
            RandomSubspace(IteratedPrisonersDilemma(), spread=-1)


class TestGaussians:
    def test_network_is_the_usual_one(self, generator: torch.Generator) -> None:
        game = GaussiansGAN(hidden=(5, 4), noise_dim=3, batch_size=6)
        players = tuple(p.detach() for p in game.initial(generator))

        def module(flat: Tensor, widths: tuple[int, ...]) -> torch.nn.Sequential:
            layers: list[torch.nn.Module] = []
            for i, o in pairwise(widths):
                layers += [torch.nn.Linear(i, o, dtype=DOUBLE), torch.nn.Tanh()]
            net = torch.nn.Sequential(*layers[:-1])
            torch.nn.utils.vector_to_parameters(flat, net.parameters())
            return net.requires_grad_(False)

        discriminator, maker = module(players[0], (2, 5, 4, 1)), module(players[1], (3, 5, 4, 2))
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        fake, real = discriminator(maker(game.noise)), discriminator(game.real)
        ones = torch.ones_like(fake)
        first, second = game.losses(players)
        assert float(first) == pytest.approx(float(entropy(real, ones) + entropy(fake, 0 * ones)))
        assert float(second) == pytest.approx(float(entropy(fake, ones)))
        game.saturating = True
        assert float(game.losses(players)[1]) == pytest.approx(-float(entropy(fake, 0 * ones)))

    def test_a_batch_stays_until_it_is_drawn_again(self, generator: torch.Generator) -> None:
        game = GaussiansGAN(hidden=(4,), noise_dim=2, batch_size=8)
        players = game.initial(generator)
        before = game.losses(players)
        assert game.losses(players) == before
        game.resample(generator)
        assert game.losses(players)[0] != before[0]

    def test_data_cover_every_mode(self, generator: torch.Generator) -> None:
        game = GaussiansGAN()
        data = game.data(4000, generator)
        assert modes_covered(data, game.centres, game.std) == 8
        # Within three standard deviations in the plane: 1 − e^{−9/2}; 4000 draws have a deviation of 0.0017.
        assert float(high_quality(data, game.centres, game.std)) == pytest.approx(
            1 - math.exp(-4.5), abs=5 * 0.0017
        )

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match="must be at least 1"):
            GaussiansGAN(batch_size=0)
        for wrong in ({"std": 0.0}, {"radius": -1.0}):
            with pytest.raises(ValueError, match="must be positive"):
                GaussiansGAN(**wrong)
        with pytest.raises(ValueError, match="num_modes"):
            GaussiansGAN(num_modes=0)


class TestModes:
    def test_counts(self) -> None:
        centres = ring()
        at = centres[[0, 0, 3]].clone()
        at[1, 0] += 0.0599  # just within three standard deviations
        at[2, 1] += 0.0601  # just outside
        assert modes_covered(at, centres, 0.02) == 1
        assert modes_covered(at, centres, 0.02, at_least=2) == 1
        assert modes_covered(at, centres, 0.02, at_least=3) == 0
        assert modes_covered(at, centres, 0.02, within=4) == 2
        assert float(high_quality(at, centres, 0.02)) == pytest.approx(2 / 3)

    def test_samples_that_are_not_finite_count_for_nothing(self) -> None:
        samples = torch.full((3, 2), math.nan, dtype=DOUBLE)
        samples[0] = torch.inf
        assert modes_covered(samples, ring(), 0.02) == 0
        assert float(high_quality(samples, ring(), 0.02)) == 0

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"shapes \(n, d\) and \(m, d\)"):
            modes_covered(torch.zeros(3), ring(), 0.02)
        with pytest.raises(ValueError, match="at least one sample"):
            high_quality(torch.zeros(0, 2), ring(), 0.02)
        with pytest.raises(ValueError, match="std must be positive"):
            modes_covered(torch.zeros(1, 2), ring(), 0.0)
