"""The LSTM with weights of each example: against torch's own, one example at a time, and derivatives in every way."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_nested.hypernetworks import HyperLSTM

STEPS, BATCH, WIDTH, UNITS, N = 5, 3, 2, 4, 3


def randomized(layer: HyperLSTM) -> HyperLSTM:
    torch.manual_seed(0)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer


def layer_and_arguments(
    sizes: tuple[int, ...] = (STEPS, BATCH, WIDTH, UNITS), dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[HyperLSTM, list[Tensor]]:
    """An LSTM, and its x, h₀, cell₀, h of each example, and parameters."""
    steps, batch, width, units = sizes
    layer = randomized(HyperLSTM(width, units, N, **options).to(dtype))
    states = (layer.num_layers * (2 if layer.bidirectional else 1), batch, units)
    of_x = (batch, steps, width) if layer.batch_first else (steps, batch, width)
    given = [torch.randn(shape, dtype=dtype) for shape in (of_x, states, states, (batch, N))]
    given += [p.detach().clone() for p in layer.parameters()]
    return layer, [a.requires_grad_() for a in given]


def called(
    layer: HyperLSTM, x: Tensor, hidden: Tensor | None, cell: Tensor | None, h: Tensor, *parameters: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, last state and last cell."""
    named = dict(zip((name for name, _ in layer.named_parameters()), parameters, strict=True))
    state = None if hidden is None or cell is None else (hidden, cell)
    y, (hidden, cell) = torch.func.functional_call(layer, named, (x, state), {"h": h})
    return y, hidden, cell


def one_by_one(
    layer: HyperLSTM, x: Tensor, hidden: Tensor | None, cell: Tensor | None, h: Tensor, *parameters: Tensor
) -> tuple[Tensor, ...]:
    """The same by torch's LSTM, each example alone with the weights at its h."""
    dim = 0 if layer.batch_first else 1
    found = [
        called(
            layer, x.narrow(dim, i, 1), *(None if s is None else s[:, i : i + 1] for s in (hidden, cell)),
            h[i], *parameters,
        )
        for i in range(len(h))
    ]  # fmt: skip
    return tuple(
        torch.cat(results, d) for results, d in zip(zip(*found, strict=True), (dim, 1, 1), strict=True)
    )


def with_gradients(results: Sequence[Tensor], given: Sequence[Tensor | None]) -> list[Tensor]:
    """Results, and the derivatives of a function of all."""
    y, hidden, cell = results
    total = y.square().sum() + (hidden * cell.sin()).sum()
    return [*results, *torch.autograd.grad(total, [a for a in given if a is not None and a.requires_grad])]


def test_the_layers_derivatives_are_those_of_its_values() -> None:
    layer, given = layer_and_arguments((3, 2, 2, 3))
    function = functools.partial(called, layer)
    assert torch.autograd.gradcheck(function, given, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("steps", [1, STEPS])
def test_each_example_has_its_own_weights(dtype: torch.dtype, tolerance: float, steps: int) -> None:
    layer, given = layer_and_arguments((steps, BATCH, WIDTH, UNITS), dtype)
    found, expected = (with_gradients(f(layer, *given), given) for f in (called, one_by_one))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}], ids=str
)
@pytest.mark.parametrize("with_state", [False, True])
def test_every_kind_of_lstm(options: dict[str, Any], with_state: bool) -> None:
    layer, given = layer_and_arguments(**options)
    if not with_state:
        given[1] = given[2] = None  # type: ignore[call-overload]
    found, expected = (with_gradients(f(layer, *given), given) for f in (called, one_by_one))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (3, 1, 2, 1), (1, 3, 1, 5), (2, 7, 3, 17), (30, 33, 9, 31)], ids=str
)
def test_every_size(sizes: tuple[int, ...]) -> None:
    """Steps, examples, width, units."""
    layer, given = layer_and_arguments(sizes)
    found, expected = (with_gradients(f(layer, *given), given) for f in (called, one_by_one))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_no_examples() -> None:
    layer, given = layer_and_arguments((STEPS, 0, WIDTH, UNITS))
    found = with_gradients(called(layer, *given), given)
    shapes = [(STEPS, 0, UNITS), (1, 0, UNITS), (1, 0, UNITS), *(a.shape for a in given)]
    assert [f.shape for f in found] == [torch.Size(shape) for shape in shapes]
    assert all((f == 0).all() for f in found)


def test_checkpointing_and_two_threads() -> None:
    layer, given = layer_and_arguments()
    expected = with_gradients(called(layer, *given), given)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = with_gradients(called(layer, *given), given)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found = with_gradients(checkpoint(called, layer, *given, use_reentrant=False), given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_products_kept_by_selective_checkpointing() -> None:
    """The context holds on to results of ``mm``, which then may not be changed in place."""
    layer, given = layer_and_arguments()
    expected = with_gradients(called(layer, *given), given)

    def policy(context: Any, operation: Any, *rest: Any, **options: Any) -> CheckpointPolicy:
        kept = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    results = checkpoint(called, layer, *given, use_reentrant=False, context_fn=contexts)
    torch.testing.assert_close(with_gradients(results, given), expected, rtol=1e-12, atol=1e-12)


def test_numbers_that_are_none_stay_with_their_example() -> None:
    layer, given = layer_and_arguments()
    given = [a.detach() for a in given]
    given[0][1, 1, 0] = torch.nan
    y, _, _ = called(layer, *given)
    assert torch.equal(y.isnan(), one_by_one(layer, *given)[0].isnan())
    assert y[1:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


def test_the_graph_serves_twice_and_outputs_may_not_be_changed() -> None:
    layer, given = layer_and_arguments()
    results = called(layer, *given)
    total = sum(r.sum() for r in results)
    first = torch.autograd.grad(total, given, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total, given), first, rtol=0, atol=0)
    y, _, _ = called(layer, *given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.mul_(2).sum().backward()  # as of torch's LSTM: outputs are needed for the backward pass
    _, _, cell = called(layer, *given)
    cell.mul_(2).sum().backward()


@pytest.mark.parametrize("frozen", [range(3, 16), [0], [4], [5], [8], [10], [3], [1, 2]], ids=str)
def test_some_gradients_of_the_layer_alone(frozen: Sequence[int]) -> None:
    """x alone; without x, W₀ or W₁ of the inputs, those of the outputs, h, the state."""
    layer, given = layer_and_arguments()
    assert len(given) == 16
    for i in frozen:
        given[i].requires_grad_(False)
    found, expected = (with_gradients(f(layer, *given), given) for f in (called, one_by_one))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_transforms_tracing_and_precisions() -> None:
    layer, given = layer_and_arguments()
    given = [a.detach() for a in given]
    expected = one_by_one(layer, *given)[0]
    with forward_ad.dual_level():
        y = called(layer, forward_ad.make_dual(given[0], torch.ones_like(given[0])), *given[1:])[0]
        value, tangent = forward_ad.unpack_dual(y)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    _, by_steps = torch.func.jvp(
        lambda x: called(layer, x, *given[1:])[0], (given[0],), (torch.ones_like(given[0]),)
    )
    torch.testing.assert_close(tangent, by_steps, rtol=1e-12, atol=1e-12)
    gradient = torch.func.grad(lambda x: called(layer, x, *given[1:])[0].sum())(given[0])
    x = given[0].clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(one_by_one(layer, x, *given[1:])[0].sum(), x)
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-12, atol=1e-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = called(layer, *[a.float() for a in given])[0]
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.1)
    y = called(copy.deepcopy(layer).bfloat16(), *[a.bfloat16() for a in given])[0]
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.2)
    y = called(layer, given[0], *[a.float() for a in given[1:3]], *given[3:])[0]
    rounded = one_by_one(layer, given[0], *[a.float().double() for a in given[1:3]], *given[3:])[0]
    torch.testing.assert_close(y, rounded, rtol=1e-12, atol=1e-12)
    traced = make_fx(lambda x: called(layer, x, *given[1:])[0])(given[0])
    torch.testing.assert_close(traced(2 * given[0]), one_by_one(layer, 2 * given[0], *given[1:])[0])


class Wrapped(nn.Module):
    """An LSTM called with tensors alone, as tracing wants it."""

    def __init__(self, layer: HyperLSTM) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (hidden, cell) = self.layer(x, (hidden, cell), h=h)
        return y, hidden, cell


def test_a_traced_lstm_computes_and_learns_the_same() -> None:
    layer, given = layer_and_arguments()
    module = Wrapped(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and comparisons of shapes
        traced = torch.jit.trace(module, tuple(a.detach() for a in given[:4]))
    inputs = [(2 * a.detach()).requires_grad_() for a in given[:4]]
    wanted = [*inputs, *layer.parameters()]
    found, expected = (with_gradients(f(*inputs), wanted) for f in (traced, module))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_layouts_in_memory() -> None:
    """Negative views, and saved tensors that hooks lay out in another way."""
    layer, given = layer_and_arguments()
    expected = with_gradients(one_by_one(layer, *given), given)

    def turned(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x

    with torch.autograd.graph.saved_tensors_hooks(turned, lambda x: x):
        found = with_gradients(called(layer, *given), given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def negative(x: Tensor) -> Tensor:
        """The same numbers, as the imaginary part of a conjugate."""
        return torch.complex(torch.zeros_like(x), -x.detach()).conj().imag.requires_grad_()

    views = [negative(a) for a in given]
    assert all(a.is_neg() for a in views)
    found = with_gradients(called(layer, *views), views)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_dual_number_after_the_layer() -> None:
    layer, given = layer_and_arguments()
    head, moved = (torch.randn(STEPS, BATCH, UNITS, dtype=torch.float64) for _ in range(2))

    def gradients(head: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((called(layer, *given)[0].tanh() * head).sum(), given)

    with forward_ad.dual_level():
        found = gradients(forward_ad.make_dual(head, moved))
        tangents = [forward_ad.unpack_dual(g).tangent for g in found]
    torch.testing.assert_close(tangents, list(gradients(moved)), rtol=1e-12, atol=1e-12)


def test_cotangents_without_memory() -> None:
    layer, given = layer_and_arguments()
    y, _, cell = called(layer, *given)
    nothing = torch._efficientzerotensor(tuple(y.shape), dtype=y.dtype)
    found = torch.autograd.grad([y, cell], given, [nothing, torch.ones_like(cell)], retain_graph=True)
    expected = torch.autograd.grad([y, cell], given, [torch.zeros_like(y), torch.ones_like(cell)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["state carried", "called twice", "state from x"])
def test_arguments_that_depend_on_each_other(case: str) -> None:
    """A graph of the backward pass must not change what it computes; neither must many cotangents."""
    lstm = randomized(HyperLSTM(UNITS, UNITS, N).double())
    x = torch.randn(STEPS, BATCH, UNITS, dtype=torch.float64, requires_grad=True)
    h = torch.randn(BATCH, N, dtype=torch.float64, requires_grad=True)
    cases: dict[str, Callable[[], Tensor]] = {
        "state carried": lambda: lstm(x[2:], lstm(x[:2], h=h)[1], h=h)[0],
        "called twice": lambda: lstm(lstm(x, h=h)[0], h=h)[0],
        "state from x": lambda: lstm(x, (x.mean(0, keepdim=True).tanh(), x[:1] * 0), h=h)[0],
    }
    y = cases[case]()
    wanted, u = [x, h, *lstm.parameters()], torch.randn_like(y)
    expected = torch.autograd.grad(y, wanted, u, retain_graph=True)
    with_graph = torch.autograd.grad(y, wanted, u, create_graph=True)
    torch.testing.assert_close(with_graph, expected, rtol=1e-11, atol=1e-11)
    batched = torch.autograd.grad(
        y, wanted, torch.stack([u, 2 * u]), is_grads_batched=True, retain_graph=True
    )
    torch.testing.assert_close(
        batched, tuple(torch.stack([g, 2 * g]) for g in expected), rtol=1e-11, atol=1e-11
    )
