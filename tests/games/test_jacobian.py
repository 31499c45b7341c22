"""Joint gradients and Jacobian products against autograd's dense Hessians, on games without any symmetry."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nested.games import (
    GaussiansGAN,
    IteratedPrisonersDilemma,
    JacobianOperator,
    QuadraticGame,
    game_jacobian,
    game_spectrum,
    joint_gradient,
)
from lightning_nested.linalg.vectors import flatten, unflatten
from tests.conftest import Normal

Players = tuple[Tensor, ...]


def three_players(p: Players) -> Players:
    """Losses of three players of 2, 3 and 1 numbers; every one depends on all, and no Jacobian block is zero."""
    x, y, z = p
    return (
        (x.sin().sum() * y.cos().prod() + (x**3).sum() * z).sum(),
        ((y**2).sum() * x.exp().sum() + (y * z).sin().sum()),
        (z**4 * x.sum() + z.cos() * (y**2).sum()).sum(),
    )


def dense(losses, players: Players) -> Tensor:  # type: ignore[no-untyped-def]
    rows = []
    for i in range(len(players)):
        hessian = torch.autograd.functional.hessian(lambda *p, i=i: losses(p)[i], players)
        rows.append(torch.cat(hessian[i], dim=1))
    return torch.cat(rows)


@pytest.fixture
def players(normal: Normal) -> Players:
    return normal(2), normal(3), normal(1)


class TestJointGradient:
    def test_is_each_players_own(self, players: Players) -> None:
        found = joint_gradient(three_players, players)
        for i, gradient in enumerate(found):
            leaves = [p.clone().requires_grad_(i == j) for j, p in enumerate(players)]
            three_players(tuple(leaves))[i].backward()
            torch.testing.assert_close(gradient, leaves[i].grad, rtol=1e-14, atol=1e-14)
            assert not gradient.requires_grad

    def test_keeps_the_structure(self, normal: Normal) -> None:
        first, second = nn.Linear(3, 2).double(), nn.Linear(2, 1).double()
        players = (tuple(first.parameters()), next(second.parameters()))
        out = second(first(normal(4, 3))).square().mean()
        found = joint_gradient((out, -out), players)
        assert isinstance(found[0], tuple)
        assert [g.shape for g in found[0]] == [p.shape for p in players[0]]
        assert found[1].shape == players[1].shape
        expected = torch.autograd.grad(second(first(normal(4, 3))).square().mean() * 0, first.parameters())
        assert len(expected) == len(found[0])

    def test_create_graph(self, players: Players) -> None:
        leaves = tuple(p.requires_grad_(True) for p in players)
        squared = sum(g.square().sum() for g in joint_gradient(three_players, leaves, create_graph=True))
        found = torch.autograd.grad(squared, leaves)
        gradient = flatten(joint_gradient(three_players, leaves))
        expected = 2 * dense(three_players, tuple(p.detach() for p in players)).T @ gradient
        torch.testing.assert_close(flatten(found), expected, rtol=1e-12, atol=1e-12)

    def test_works_without_gradients_enabled(self, players: Players) -> None:
        with torch.no_grad():
            assert len(joint_gradient(three_players, players)) == 3

    def test_unused_tensor_of_a_player_has_zero_gradient(self) -> None:
        x, spare, y = (torch.ones(2) for _ in range(3))
        first, second = joint_gradient(lambda p: ((p[0][0] * p[1]).sum(), (p[1] ** 2).sum()), ((x, spare), y))
        assert first[1].tolist() == [0.0, 0.0]
        assert second.tolist() == [2.0, 2.0]

    def test_reduce_averages_in_one_message(self, players: Players) -> None:
        messages = []

        def halve(flat: Tensor) -> Tensor:
            messages.append(flat.shape)
            return flat / 2

        found = joint_gradient(three_players, players, reduce=halve)
        alone = joint_gradient(three_players, players)
        assert all(torch.equal(a * 2, b) for a, b in zip(found, alone, strict=True))
        assert messages == [(3,), (6,)]  # the losses, to agree on whether they are finite, and all gradients


class TestOperator:
    def test_products_equal_the_dense_jacobian(self, players: Players, normal: Normal) -> None:
        truth = dense(three_players, players)
        assert (truth - truth.T).abs().max() > 0.1
        operator = JacobianOperator(three_players, players)
        for _ in range(3):  # a kept graph serves any number of products
            v = normal(6)
            torch.testing.assert_close(operator @ v, truth @ v, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(operator.T @ v, truth.T @ v, rtol=1e-12, atol=1e-12)
            u = flatten(operator.T.rmatvec(unflatten(v, players)))
            torch.testing.assert_close(u, truth @ v, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(operator.dense(), truth, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(game_jacobian(three_players, players), truth, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            flatten(operator.gradient), flatten(joint_gradient(three_players, players))
        )
        assert operator.T.T is operator
        assert operator.size == 6
        assert not operator.symmetric

    def test_products_are_the_callers(self, players: Players, normal: Normal) -> None:
        operator = JacobianOperator(three_players, players)
        v = unflatten(normal(6), players)
        first = operator.matvec(v)
        kept = flatten(first).clone()
        for a in first:
            a.zero_()
        assert torch.equal(flatten(operator.matvec(v)), kept)

    def test_networks_with_given_losses(self, normal: Normal) -> None:
        maker, judge = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)), nn.Linear(2, 1)
        maker.double(), judge.double()
        noise, real = normal(8, 2), normal(8, 2)
        fake = judge(maker(noise)).mean()
        losses = (fake - judge(real).tanh().mean(), -fake.tanh())
        players = (tuple(judge.parameters()), tuple(maker.parameters()))
        operator = JacobianOperator(losses, players)
        assert operator.owners == (0, 0, 1, 1, 1, 1)
        matrix = operator.dense()
        for i in (0, 5, 20):
            unit = torch.zeros(operator.size, dtype=torch.float64)
            unit[i] = 1.0
            torch.testing.assert_close(operator @ unit, matrix[:, i], rtol=1e-12, atol=1e-14)
        losses[0].backward()  # the graph of the losses is still there

    def test_blocks(self, players: Players) -> None:
        truth = dense(three_players, players)
        operator = JacobianOperator(three_players, players)
        for player, part in enumerate((slice(0, 2), slice(2, 5), slice(5, 6))):
            block = operator.block(player)
            own = torch.stack([block @ e for e in torch.eye(part.stop - part.start, dtype=torch.float64)])
            assert block.symmetric
            torch.testing.assert_close(own, truth[part, part], rtol=1e-12, atol=1e-12)
        for wrong in (-1, 3):
            with pytest.raises(ValueError, match=rf"player must lie in \[0, 3\)\. Got {wrong}"):
                operator.block(wrong)

    def test_reduce_averages_every_product(self, players: Players, normal: Normal) -> None:
        v = normal(6)
        alone = JacobianOperator(three_players, players)
        halved = JacobianOperator(three_players, players, reduce=lambda flat: flat / 2)
        assert torch.equal(2 * (halved @ v), alone @ v)
        assert torch.equal(2 * (halved.T @ v), alone.T @ v)
        assert torch.equal(2 * (halved.block(1) @ v[:3]), alone.block(1) @ v[:3])
        assert torch.equal(2 * halved.dense(), alone.dense())

    def test_linear_losses_have_no_curvature(self) -> None:
        x, y = torch.ones(2), torch.ones(3)
        operator = JacobianOperator(lambda p: (p[0].sum(), p[1].sum()), (x, y))
        assert not operator.dense().any()
        assert not (operator @ torch.ones(5)).any()

    def test_iterated_game(self, normal: Normal) -> None:
        game = IteratedPrisonersDilemma()
        players = (normal(5), normal(5))
        torch.testing.assert_close(
            game_jacobian(game.losses, players), dense(game.losses, players), rtol=1e-10, atol=1e-12
        )

    def test_a_product_costs_about_a_gradient(self) -> None:
        """Counted, not timed: a product with Jᵀ runs no more matrix products than 2.5 joint gradients."""
        game = GaussiansGAN(hidden=(8, 8))
        players = game.initial()
        operator = JacobianOperator(game.losses, players)
        v = tuple(torch.ones_like(p) for p in players)

        def multiplications(run) -> int:  # type: ignore[no-untyped-def]
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                run()
            return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm"))

        gradient = multiplications(lambda: joint_gradient(game.losses, players))
        assert multiplications(lambda: operator.rmatvec(v)) <= 2.5 * gradient
        assert multiplications(lambda: operator.matvec(v)) <= 3.5 * gradient


class TestBadInput:
    def test_shared_tensors(self) -> None:
        x = torch.ones(2, requires_grad=True)
        for function in (joint_gradient, game_jacobian):
            with pytest.raises(
                ValueError, match=r"belong to one player, once\. Got one of shape \(2,\) for players 0 and 1"
            ):
                function(lambda p: ((p[0] * p[1]).sum(), p[1].sum()), (x, x))
        with pytest.raises(ValueError, match="players 0 and 0"):
            joint_gradient(lambda p: (p[0][0].sum(), p[1].sum()), ((x, x), torch.ones(1)))

    def test_one_plain_tensor_may_be_the_point_of_all(self) -> None:
        x = torch.ones(1)
        assert game_jacobian(lambda p: ((p[0] * p[1]).sum(), -(p[0] * p[1]).sum()), (x, x)).tolist() == [
            [0.0, 1.0],
            [-1.0, 0.0],
        ]

    def test_loss_that_does_not_depend_on_its_player(self) -> None:
        for function in (joint_gradient, game_jacobian):
            with pytest.raises(ValueError, match="loss of player 1 must depend on that player"):
                function(lambda p: (p[0].square().sum(), p[0].sum()), (torch.ones(2), torch.ones(2)))

    def test_loss_that_is_not_finite(self) -> None:
        with pytest.raises(FloatingPointError, match=r"Every loss must be finite\. Got \[inf, 1\.0\]"):
            joint_gradient(lambda p: (1 / p[0].sum(), p[1].sum()), (torch.zeros(1), torch.ones(1)))

    def test_every_process_raises_or_none(self) -> None:
        with pytest.raises(
            FloatingPointError, match="Every loss must be finite"
        ):  # another process's was not
            joint_gradient(
                lambda p: (p[0].sum(), p[1].sum()),
                (torch.ones(1), torch.ones(2)),
                reduce=lambda flat: flat * torch.nan,
            )

    def test_losses_that_do_not_fit(self) -> None:
        x, y = torch.ones(2), torch.ones(2)
        with pytest.raises(
            ValueError, match=r"one scalar loss for each of the 2 players\. Got shapes \[\(\)\]"
        ):
            joint_gradient(lambda p: (p[0].sum(),), (x, y))
        with pytest.raises(ValueError, match=r"Got shapes \[\(2,\), \(2,\)\]"):
            joint_gradient(lambda p: p, (x, y))
        with pytest.raises(ValueError, match="loss of player 1 must have a graph"):
            joint_gradient(lambda p: (p[0].sum(), p[1].sum().detach()), (x, y))

    @pytest.mark.parametrize("function", [joint_gradient, game_jacobian, game_spectrum])
    @pytest.mark.parametrize(
        ("losses", "message"),
        [
            (
                lambda p: (p[0].sum(), 2.0),
                r"player 1 must be a scalar tensor with its graph\. Got a float; compute",
            ),
            (lambda p: {"x": p[0].sum()}, r"player 0 must be a scalar tensor with its graph\. Got a str"),
            (lambda p: p[0].sum(), r"for each player, in a tuple\. Got a Tensor; return \(loss_1"),
            (lambda p: None, r"for each player, in a tuple\. Got a NoneType"),
            ([1.0, 2.0], r"losses must be .* a list of Tensors\. Got \[1.0, 2.0\]"),
        ],
    )
    def test_losses_that_are_no_tensors(self, function: Any, losses: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            function(losses, (torch.ones(2), torch.ones(2)))

    def test_players_that_do_not_fit(self) -> None:
        game = QuadraticGame.from_eigenvalues([1j])
        with pytest.raises(ValueError, match="players must be a tuple with one entry per player"):
            joint_gradient(game.losses, ())
        with pytest.raises(ValueError, match="must hold a tensor"):
            joint_gradient(lambda p: (), (torch.ones(1), ()))
        with pytest.raises(ValueError, match="floating-point tensors"):
            joint_gradient(game.losses, (torch.ones(1), torch.ones(1, dtype=torch.int64)))


def coupled(players: Players) -> Players:
    product = players[0].sum() * players[1].square().sum()
    return product, -product


@pytest.mark.parametrize("views", ["a part", "shifted", "strided"])
def test_players_that_share_memory_in_part_are_refused(views: str) -> None:
    v = torch.ones(6, dtype=torch.float64)
    pairs = {"a part": (v[:2], v), "shifted": (v[:4], v[3:]), "strided": (v[::3], v[1:4])}
    players = tuple(p.detach().requires_grad_() for p in pairs[views])
    with pytest.raises(ValueError, match="belong to one player, once"):
        joint_gradient(coupled, players)


def test_players_in_one_storage_without_common_numbers_are_fine() -> None:
    m = torch.arange(8, dtype=torch.float64).reshape(4, 2)
    for pair in ((m[:, 0], m[:, 1]), (m[:2], m[2:]), (m[:, :1], m[:, 1:])):
        players = tuple(p.detach().requires_grad_() for p in pair)
        found = joint_gradient(coupled, players)
        torch.testing.assert_close(found[0], torch.full_like(pair[0], float(pair[1].square().sum())))
