"""KroneckerFisher against dense sums over the gradients of single examples and positions."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_nested.linalg.kronecker import KroneckerFisher
from tests.cases import DOUBLE
from tests.conftest import Normal


def close(found: Any, expected: Any) -> None:
    """Sums of the same products in another order: a few hundred terms of order one."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def seen(net: nn.Module, loss: Callable[[], Tensor], scale: float = 1.0, **options: Any) -> KroneckerFisher:
    fisher = KroneckerFisher(net, dict(net.named_parameters()), **options)
    observe(fisher, net, loss, scale)
    return fisher


def observe(fisher: KroneckerFisher, net: nn.Module, loss: Callable[[], Tensor], scale: float = 1.0) -> None:
    net.zero_grad()
    with fisher.observing():
        (loss() * scale).backward()
    fisher.update(scale)


def dense(fisher: KroneckerFisher, layer: int = 0) -> Tensor:
    """G ⊗ A, whose rows and columns are the entries of the matrix (weight, bias)."""
    pair = fisher.factors[layer]
    assert pair is not None
    return torch.kron(pair[1], pair[0])


def joined(layer: nn.Module) -> Tensor:
    """The gradient of a layer as the matrix (weight, bias), flat."""
    parts = [p.grad.flatten(1) if p.dim() > 1 else p.grad[:, None] for p in layer.parameters()]  # type: ignore[union-attr]
    return torch.cat(parts, dim=1).flatten()


@pytest.mark.parametrize("bias", [True, False])
def test_one_example_has_the_exact_fisher(bias: bool, normal: Normal) -> None:
    layer, x, y = nn.Linear(3, 2, bias=bias, dtype=DOUBLE), normal(1, 3), normal(1, 2)
    fisher = seen(layer, lambda: ((layer(x) - y) ** 2).sum())
    gradient = joined(layer)
    close(dense(fisher), torch.outer(gradient, gradient))


def test_factors_of_a_batch_are_sums_over_examples(normal: Normal) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(DOUBLE)
    x, y = normal(6, 3), normal(6, 2)
    fisher = seen(net, lambda: ((net(x) - y) ** 2).sum(1).mean())
    inputs = [x, torch.tanh(net[0](x)).detach()]
    for k, layer in enumerate((net[0], net[2])):
        expected_a, expected_g = torch.zeros((), dtype=DOUBLE), torch.zeros((), dtype=DOUBLE)
        for n in range(6):
            net.zero_grad()
            ((net(x[n]) - y[n]) ** 2).sum().backward()
            # the gradient of the bias is that of the output
            g, a = layer.bias.grad, torch.cat([inputs[k][n], torch.ones(1)])
            expected_a, expected_g = (
                expected_a + torch.outer(a, a) / 6,
                expected_g + torch.outer(g, g) / 6,
            )
        for found, expected in zip(fisher.factors[k], (expected_a, expected_g), strict=True):
            close(found, expected)


def test_the_fisher_is_exact_where_inputs_and_gradients_are_independent(normal: Normal) -> None:
    """Every input meets every gradient of the output, so that their second moments factor."""
    layer, a, g = nn.Linear(3, 2, bias=False, dtype=DOUBLE), normal(4, 3), normal(5, 2)
    x, slopes = a.repeat_interleave(5, 0), g.repeat(4, 1)
    fisher = seen(layer, lambda: (layer(x) * slopes).sum(1).mean())
    single = torch.einsum("no,ni->noi", slopes, x).flatten(1)
    close(dense(fisher), single.T @ single / 20)


def convolved(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output of a convolution and the patch of each of its positions, by indexing alone."""
    (sh, sw), (dh, dw), (kh, kw) = conv.stride, conv.dilation, conv.kernel_size
    same = [d * (k - 1) // 2 for d, k in ((dh, kh), (dw, kw))]
    ph, pw = {"same": same, "valid": [0, 0]}[conv.padding] if isinstance(conv.padding, str) else conv.padding
    padded = functional.pad(x, (pw, pw, ph, ph))
    rows, columns = conv(x).shape[2:]
    patches = []
    for i in range(rows):
        for j in range(columns):
            patch = padded[
                :, :, i * sh : i * sh + dh * (kh - 1) + 1 : dh, j * sw : j * sw + dw * (kw - 1) + 1 : dw
            ]
            patches.append(patch.flatten(1))
    weight = conv.weight.flatten(1)
    outputs = [patch @ weight.T + (0 if conv.bias is None else conv.bias) for patch in patches]
    return torch.stack(outputs, -1).view(len(x), -1, rows, columns), patches


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": (2, 1)},
    "padding": {"padding": (0, 2)},
    "dilation": {"dilation": 2},
    "all": {"stride": 2, "padding": 1, "dilation": (1, 2)},
    "same": {"padding": "same", "dilation": (1, 2)},
    "valid": {"padding": "valid"},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_are_brute_force_over_positions(options: Any, normal: Normal) -> None:
    conv, x = nn.Conv2d(2, 3, (3, 3), dtype=DOUBLE, **options), normal(2, 2, 6, 7)
    slopes = normal(*conv(x).shape)
    output, patches = convolved(conv, x)
    close(output, conv(x))
    fisher = seen(conv, lambda: (conv(x) * slopes).sum() / 2)
    ones = [] if conv.bias is None else [torch.ones(2, 1, dtype=DOUBLE)]
    rows = torch.cat([torch.cat([patch, *ones], dim=1) for patch in patches])
    g = slopes.transpose(0, 1).flatten(1).T
    # each position is an example: mean over examples of the sum over positions
    for found, expected in zip(fisher.factors[0], (rows.T @ rows / len(rows), g.T @ g / 2), strict=True):
        close(found, expected)


def test_a_mean_over_tokens_has_the_fisher_of_its_tokens(normal: Normal) -> None:
    """Dense sum over single tokens; exact, because every input meets every gradient of the output."""
    layer, a, g = nn.Linear(3, 2, bias=False, dtype=DOUBLE), normal(4, 3), normal(5, 2)
    x, slopes = a.repeat_interleave(5, 0).view(4, 5, 3), g.repeat(4, 1).view(4, 5, 2)
    single = torch.einsum("nto,nti->ntoi", slopes, x).flatten(2).flatten(0, 1)
    for mean in (lambda y: y.mean(), lambda y: y.sum() / 20, lambda y: y.mean(1).mean()):
        fisher = KroneckerFisher(layer, dict(layer.named_parameters()))
        layer.zero_grad()
        with fisher.observing():
            loss = mean((layer(x) * slopes).sum(2))
            fisher.expect(loss)
            loss.backward()
        fisher.update()
        close(dense(fisher), single.T @ single / 20)


def test_a_diagonal_has_the_terms_of_the_loss_or_the_size_of_the_batch(normal: Normal) -> None:
    """As under torch.compile, which runs no hooks; the loss is seen where it is not compiled with the network."""
    layer, x = nn.Linear(3, 2, dtype=DOUBLE), normal(4, 5, 3)

    def squares(loss: Callable[[Tensor], Tensor], **given: Any) -> list[Tensor | None]:
        fisher = KroneckerFisher(layer, dict(layer.named_parameters()))
        layer.zero_grad()
        with fisher.observing():
            fisher.pause(False, **given)
            value = loss(functional.linear(x, layer.weight, layer.bias))
            fisher.expect(value)
            value.backward()
        fisher.update()
        return fisher.squares

    def unknown(y: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(y)
        return norm

    for loss, given, terms in (
        (lambda y: y.square().sum(2).mean(), {}, 20),
        (lambda y: y.square().sum((1, 2)).mean(), {"batch": normal(9)}, 4),
        (unknown, {"batch": [x, normal(7)]}, 4),
        (unknown, {}, 1),
    ):
        found = squares(loss, **given)  # type: ignore[arg-type]
        for square, p in zip(found, layer.parameters(), strict=True):
            close(square, terms * p.grad.square())  # type: ignore[union-attr]


def test_accumulated_means_over_tokens_are_one_batch(normal: Normal) -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(DOUBLE), normal(6, 5, 3)
    found = []
    for parts in (1, 3):
        fisher = KroneckerFisher(net, dict(net.named_parameters()))
        net.zero_grad()
        with fisher.observing():
            for part in x.split(6 // parts):
                loss = net(part).square().sum(2).mean() / parts
                fisher.expect(loss, parts)
                loss.backward()
        fisher.update(batches=parts)
        found.append(fisher)
    for k in (0, 1):
        close(dense(found[1], k), dense(found[0], k))
    for i in (2, 3):
        close(found[1].squares[i], found[0].squares[i])


class ClassesFirst(nn.Module):
    """(batch, tokens, classes) → (batch, classes, tokens), as cross-entropy takes them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "MLP": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)), (6, 3), (6,)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)
        ),
        (6, 2, 5, 5),
        (6,),
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), ClassesFirst()),
        (6, 7, 3),
        (6, 7),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_factors_are_those_of_curvlinops(name: str, normal: Normal) -> None:
    """Of the empirical Fisher information of a mean cross-entropy, where both have the same definition."""
    curvlinops = pytest.importorskip("curvlinops")
    make, size, labels = NETWORKS[name]
    net, x = make().to(DOUBLE), normal(*size)
    y = torch.randint(4, labels, generator=torch.Generator().manual_seed(0))
    fisher = KroneckerFisher(net, dict(net.named_parameters()))
    with fisher.observing():
        loss = functional.cross_entropy(net(x), y)
        fisher.expect(loss)
        loss.backward()
    fisher.update()
    peer = curvlinops.KFACLinearOperator(
        net,
        nn.CrossEntropyLoss(),
        list(net.parameters()),
        [(x, y)],
        fisher_type="empirical",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    peer.compute_kronecker_factors()
    names = [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for n, (a, g) in zip(names, fisher.factors, strict=True):  # type: ignore[misc]
        close(a, peer._input_covariances[n])
        close(g, peer._gradient_covariances[n])


def test_positions_of_a_sequence_count_as_examples(normal: Normal) -> None:
    layer, x, slopes = nn.Linear(3, 2, dtype=DOUBLE), normal(4, 5, 3), normal(4, 5, 2)
    fisher = seen(layer, lambda: (layer(x) * slopes).sum() / 4)
    a = torch.cat([x.reshape(20, 3), torch.ones(20, 1)], dim=1)
    g = slopes.reshape(20, 2)
    for found, expected in zip(fisher.factors[0], (a.T @ a / 20, g.T @ g / 4), strict=True):
        close(found, expected)


def test_calls_of_a_layer_are_its_positions(normal: Normal) -> None:
    """Twice in a forward pass, and once with both inputs in a sequence, is the same network."""
    layer, x, slopes = nn.Linear(3, 2, dtype=DOUBLE), normal(4, 5, 3), normal(4, 5, 2)
    whole = seen(layer, lambda: (layer(x) * slopes).sum() / 4)
    parts = seen(
        layer,
        lambda: ((layer(x[:, :2]) * slopes[:, :2]).sum() + (layer(input=x[:, 2:]) * slopes[:, 2:]).sum()) / 4,
    )
    close(dense(parts), dense(whole))


@pytest.mark.parametrize("size", [(3,), (2, 5, 5)])
def test_an_input_without_a_batch_is_one_example(size: tuple[int, ...], normal: Normal) -> None:
    layer: Any = nn.Linear(3, 2) if len(size) == 1 else nn.Conv2d(2, 3, 2)
    layer.to(DOUBLE)
    x = normal(*size)
    alone = seen(layer, lambda: layer(x).square().sum())
    batch = seen(layer, lambda: layer(x[None]).square().sum())
    close(dense(alone), dense(batch))


def test_other_backward_passes_through_the_graph_do_not_count(normal: Normal) -> None:
    """A gradient penalty in the training step, and a network that is evaluated and never differentiated."""
    net, x = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(DOUBLE),
        normal(6, 3).requires_grad_(),
    )

    def penalized() -> Tensor:
        net(x)
        y = net(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return slope.square().sum(1).mean() + y.square().mean()

    outputs: list[Tensor] = []
    handle = net[2].register_forward_hook(lambda m, a, y: outputs.append(y))
    gradient = torch.autograd.grad(penalized(), outputs[1])[0]
    handle.remove()
    pair = seen(net, penalized).factors[1]
    assert pair is not None
    close(pair[1], 6 * gradient.T @ gradient)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_is_seen_once(reentrant: bool, normal: Normal) -> None:
    net, x = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(DOUBLE),
        normal(6, 3).requires_grad_(),
    )
    plain = seen(net, lambda: net(x).square().mean())
    again = seen(net, lambda: checkpoint(net, x, use_reentrant=reentrant).square().mean())  # type: ignore[union-attr]
    for k in (0, 1):
        close(dense(again, k), dense(plain, k))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x))) * self.scale
        return y


def test_tied_weights_and_other_parameters_have_the_diagonal(normal: Normal) -> None:
    net, x = Tied().to(DOUBLE), normal(6, 3)
    parameters = dict(net.named_parameters())
    fisher = KroneckerFisher(net, parameters)
    assert fisher.factors == []
    net(x).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in parameters.items()}  # type: ignore[union-attr]
    fisher.update(batches=3, processes=2)
    inverse, v = fisher.inverse([0.1, 0.2]), tuple(normal(*p.shape) for p in parameters.values())
    for got, b, g, damping in zip(inverse @ v, v, gradients.values(), (0.1, 0.2), strict=True):
        close(got, b / (6 * g.square() + damping))


def test_layers_that_are_too_large_or_grouped_have_the_diagonal() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    assert len(KroneckerFisher(net, dict(net.named_parameters())).factors) == 2
    assert len(KroneckerFisher(net, dict(net.named_parameters()), max_size=8).factors) == 1


def test_accumulated_batches_are_one_batch(normal: Normal) -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(DOUBLE), normal(6, 3)
    whole = seen(net, lambda: net(x).square().mean())
    fisher = KroneckerFisher(net, dict(net.named_parameters()))
    net.zero_grad()
    with fisher.observing():
        for part in x.split(2):
            (net(part).square().mean() / 3).backward()
    fisher.update(batches=3)
    for k in (0, 1):
        close(dense(fisher, k), dense(whole, k))


def test_the_scale_of_a_gradient_scaler_cancels(normal: Normal) -> None:
    """Of the hooks, and of ``.grad``, which has been divided already where the optimizer is not fused."""
    net, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)).to(DOUBLE), normal(6, 3)
    plain = seen(net, lambda: net(x).square().mean())
    scaled = seen(net, lambda: net(x).square().mean(), scale=2.0**10)
    divided = KroneckerFisher(net, dict(net.named_parameters()))
    net.zero_grad()
    with divided.observing():
        (net(x).square().mean() * 2.0**10).backward()
    for p in net.parameters():
        p.grad /= 2.0**10
    divided.update(1.0, hook_scale=2.0**10)
    v = tuple(normal(*p.shape) for p in net.parameters())
    expected = plain.inverse([0.1] * 6) @ v
    for fisher in (scaled, divided):
        for got, b in zip(fisher.inverse([0.1] * 6) @ v, expected, strict=True):
            close(got, b)


def test_the_mean_runs_over_observations(normal: Normal) -> None:
    layer, xs = nn.Linear(3, 2, dtype=DOUBLE), normal(4, 5, 3)
    fisher = KroneckerFisher(layer, dict(layer.named_parameters()), memory=0.6)
    for x in xs:
        observe(fisher, layer, lambda x=x: layer(x).square().mean())  # type: ignore[misc]
    # 1, ½, then 1 − memory = 0.4
    a = [torch.cat([x, torch.ones(5, 1)], 1) for x in xs]
    second = [m.T @ m / 5 for m in a]
    expected = 0.6 * (0.6 * (second[0] + second[1]) / 2 + 0.4 * second[2]) + 0.4 * second[3]
    assert fisher.observations == 4
    close(fisher.factors[0][0], expected)  # type: ignore[index]


def test_the_inverse_is_that_of_the_damped_factors(normal: Normal) -> None:
    layer, x, y = nn.Linear(3, 2, dtype=DOUBLE), normal(8, 3), normal(8, 2)
    fisher = seen(layer, lambda: ((layer(x) - y) ** 2).sum(1).mean())
    a, g = fisher.factors[0]  # type: ignore[misc]
    damping = torch.tensor([[0.1, 0.3, 0.2], [0.4, 0.2, 0.0]], dtype=DOUBLE)  # its mean is 0.2
    ratio = ((a.trace() / 4) / (g.trace() / 2)).sqrt()
    eye = partial(torch.eye, dtype=DOUBLE)
    matrix = torch.kron(g + 0.2**0.5 / ratio * eye(2), a + 0.2**0.5 * ratio * eye(4))
    v = normal(2, 3), normal(2)
    expected = torch.linalg.solve(matrix, torch.cat([v[0], v[1][:, None]], 1).flatten()).view(2, 4)
    found = fisher.inverse([damping, 7.0]) @ v
    torch.testing.assert_close(torch.cat([found[0], found[1][:, None]], 1), expected, rtol=1e-10, atol=0)


def test_the_mean_of_the_diagonal_is_over_factors_and_squares(normal: Normal) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False)).to(DOUBLE)
    x, y = normal(6, 3), normal(6, 2)
    assert KroneckerFisher(net, dict(net.named_parameters())).mean_diagonal() == 0.0
    fisher = seen(net, lambda: ((net(x) - y) ** 2).mean())
    parts = [dense(fisher, k).diagonal() for k in (0, 1)]
    squares = [s.flatten() for s in fisher.squares if s is not None]
    assert [len(part) for part in (*parts, *squares)] == [16, 8, 4, 4]
    assert fisher.mean_diagonal() == pytest.approx(float(torch.cat([*parts, *squares]).mean()), rel=1e-12)


def test_without_observations_only_the_damping_is_left(normal: Normal) -> None:
    layer = nn.Linear(3, 2, dtype=DOUBLE)
    v = normal(2, 3), normal(2)
    found = KroneckerFisher(layer, dict(layer.named_parameters())).inverse([0.5, 0.25]) @ v
    assert torch.equal(found[0], 2 * v[0])
    assert torch.equal(found[1], 4 * v[1])


def test_half_precision_keeps_the_type_of_the_parameters() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).to(torch.bfloat16)
    fisher = seen(net, lambda: net(torch.ones(2, 3, dtype=torch.bfloat16)).square().sum())
    v = tuple(torch.ones_like(p) for p in net.parameters())
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in fisher.inverse([0.1] * 4) @ v)


def test_what_is_not_finite_is_left_out(normal: Normal) -> None:
    """An overflow under a gradient scaler belongs to a step that is skipped."""
    net, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).to(DOUBLE), normal(6, 3)
    fisher = seen(net, lambda: net(x).square().mean())
    before = [f.clone() for f in fisher.factors[0]]  # type: ignore[union-attr]
    observe(fisher, net, lambda: net(x).square().mean() * float("inf"))
    assert fisher.observations == 1
    assert all(torch.equal(a, b) for a, b in zip(before, fisher.factors[0], strict=True))
    fisher.factors[0][0][0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(FloatingPointError, match="A Kronecker factor"):
        fisher.inverse([0.1] * 4)


def test_states_are_restored_bit_by_bit_and_only_for_the_same_layers(normal: Normal) -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(DOUBLE), normal(6, 3)
    fisher = seen(net, lambda: net(x).square().mean())
    inverse = fisher.inverse([0.1] * 6)
    file = io.BytesIO()
    torch.save((fisher.state_dict(), inverse.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    twin = KroneckerFisher(net, dict(net.named_parameters()))
    twin.load_state_dict(saved[0])
    restored = twin.restored_inverse(saved[1])
    assert restored is not None
    v = tuple(normal(*p.shape) for p in net.parameters())
    for other in (twin.inverse([0.1] * 6), restored):
        assert all(torch.equal(a, b) for a, b in zip(other @ v, inverse @ v, strict=True))
    for f in (fisher, twin):
        observe(f, net, lambda: net(x + 1).square().mean())
    assert torch.equal(dense(twin, 1), dense(fisher, 1))

    wider = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)).to(DOUBLE)
    for parameters in (dict(wider.named_parameters()), dict(list(net.named_parameters())[:2])):
        fresh = KroneckerFisher(wider if len(parameters) == 6 else net, parameters)
        fresh.load_state_dict(saved[0])
        assert fresh.observations == 0
        assert fresh.restored_inverse(saved[1]) is None


@pytest.mark.parametrize("batch", [2, 9])
def test_few_rows_and_many_enter_the_same_mean(batch: int, normal: Normal) -> None:
    """Of three steps with two calls each; inputs that are overwritten before the update do not count."""
    layer = nn.Linear(5, 4, bias=False, dtype=DOUBLE)
    fisher = KroneckerFisher(layer, dict(layer.named_parameters()))
    expected = torch.zeros(5, 5, dtype=DOUBLE), torch.zeros(4, 4, dtype=DOUBLE)
    for _ in range(3):
        x, y = normal(batch, 5), normal(batch, 5)
        expected[0].add_((x.T @ x + y.T @ y) / (2 * batch) / 3)
        output = [layer(each).detach() for each in (x, y)]
        expected[1].add_(sum(4 * z.T @ z / batch / 3 for z in output))
        with fisher.observing():
            sum(layer(each).square().sum(1).mean() for each in (x, y)).backward()
        x.zero_()
        fisher.update()
    for found, right in zip(fisher.factors[0], expected, strict=True):  # type: ignore[arg-type]
        close(found, right)


def test_states_do_not_move_with_later_observations(normal: Normal) -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).to(DOUBLE), normal(6, 3)
    fisher = seen(net, lambda: net(x).square().mean())
    saved = fisher.state_dict()
    kept = copy.deepcopy(saved)
    twin = KroneckerFisher(net, dict(net.named_parameters()))
    twin.load_state_dict(saved)
    for f in (fisher, twin):
        observe(f, net, lambda: net(x + 1).square().mean())
    for now, then in zip(saved["factors"][0], kept["factors"][0], strict=True):
        assert torch.equal(now, then)


class Branch(nn.Module):
    """Calls its first layer only where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)
        self.calls_first = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x) if self.calls_first else x))
        return y.square().sum(1).mean()


@pytest.mark.parametrize("second_calls_first", [True, False])
def test_two_processes_have_the_means_over_both(second_calls_first: bool, normal: Normal) -> None:
    whole, x = Branch().to(DOUBLE), normal(6, 3)
    nets = [copy.deepcopy(whole) for _ in range(2)]
    nets[1].calls_first = second_calls_first
    alone = [seen(net, lambda net=net, k=k: net(x[3 * k : 3 * k + 3])) for k, net in enumerate(nets)]  # type: ignore[misc]
    fishers = [KroneckerFisher(net, dict(net.named_parameters())) for net in nets]
    for k, (fisher, net) in enumerate(zip(fishers, nets, strict=True)):
        net.zero_grad()
        with fisher.observing():
            net(x[3 * k : 3 * k + 3]).backward()
    for p, q in zip(*(net.norm.parameters() for net in nets), strict=True):
        p.grad = q.grad = (p.grad + q.grad) / 2  # as DDP leaves it
    message: list[Tensor] = []

    def send(flat: Tensor) -> Tensor:
        message.append(flat)
        return flat

    fishers[0].update(reduce=send, processes=2)
    fishers[1].update(reduce=lambda flat: (flat + message[0]) / 2, processes=2)
    found = fishers[1]
    if second_calls_first:
        joined_batch = seen(whole, lambda: whole(x))
        for layer in (0, 1):
            close(dense(found, layer), dense(joined_batch, layer))
        for i in (2, 3):
            close(found.squares[i], joined_batch.squares[i])
    else:
        # the second's gradients are zero there, and it has no inputs
        close(dense(found), dense(alone[0]) / 2)
        pairs = [f.factors[1] for f in (found, *alone)]
        close(pairs[0][1], (pairs[1][1] + pairs[2][1]) / 2)  # type: ignore[index]
