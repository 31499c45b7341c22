"""The LSTM layer in C: the eager one's values and derivatives, and the eager one itself where C cannot be."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_nested.hypernetworks import BestResponse, HyperLSTM, best_response, native
from tests.optim.cases import COMPILER

needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C compiler here")

STEPS, BATCH, WIDTH, UNITS, N = 5, 3, 4, 6, 2


@pytest.fixture
def afresh() -> Iterator[None]:
    """As in a process that has not compiled yet."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs of each layer taken in C."""
    seen: list[torch.Size] = []
    real = native._Layer.forward

    def forward(ctx: Any, x: Tensor, *rest: Tensor) -> Any:
        seen.append(x.shape)
        return real(ctx, x, *rest)

    monkeypatch.setattr(native._Layer, "forward", staticmethod(forward))
    return seen


def arguments(dtype: torch.dtype = torch.float64, steps: int = STEPS) -> list[Tensor]:
    torch.manual_seed(0)
    rows = 4 * UNITS
    shapes = [(steps, BATCH, WIDTH), (BATCH, UNITS), (BATCH, UNITS)]
    shapes += [
        (rows, WIDTH),
        (rows, WIDTH),
        (BATCH, rows),
        (rows, UNITS),
        (rows, UNITS),
        (BATCH, rows),
        (rows,),
    ]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def layer(*given: Tensor, compiled: bool = True) -> tuple[Tensor, Tensor]:
    x, h, cell, *rest = given
    of_x, of_h = (rest[0], rest[1], rest[2]), (rest[3], rest[4], rest[5])
    return native.lstm_layer(x, (h, cell), of_x, of_h, rest[6], compiled=compiled)


def pair(**options: Any) -> tuple[HyperLSTM, HyperLSTM]:
    """One in C, and its eager copy."""
    torch.manual_seed(0)
    fast = HyperLSTM(WIDTH, UNITS, N, compiled=True, **options).double()
    for p in fast.parameters():
        nn.init.normal_(p, std=0.5)
    slow = copy.deepcopy(fast)
    slow.compiled = False
    return fast, slow


def results(lstm: nn.Module, x: Tensor, *rest: Any, h: Tensor) -> list[Tensor]:
    y, (hidden, cell) = lstm(x, *rest, h=h)
    total = y.square().sum() + (hidden * cell.sin()).sum()
    return [y, hidden, cell, *torch.autograd.grad(total, [x, h, *lstm.parameters()])]


@needs_compiler
def test_its_derivatives_are_those_of_its_values(calls: list[torch.Size]) -> None:
    given = arguments()
    assert torch.autograd.gradcheck(layer, given, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(layer, given, fast_mode=True)
    assert set(calls) == {torch.Size((STEPS, BATCH, WIDTH))}


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("steps", [1, STEPS])
def test_it_is_the_eager_layer(
    dtype: torch.dtype, tolerance: float, steps: int, calls: list[torch.Size]
) -> None:
    given = arguments(dtype, steps)

    def all_of(compiled: bool) -> list[Tensor]:
        y, cell = layer(*given, compiled=compiled)
        return [y, cell, *torch.autograd.grad((y * cell).sum(), given)]

    torch.testing.assert_close(all_of(True), all_of(False), rtol=tolerance, atol=tolerance)
    assert len(calls) == 1


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"bias": False},
        {"num_layers": 2, "dropout": 0.4},
    ],
    ids=str,
)
def test_every_kind_of_lstm(options: dict[str, Any], calls: list[torch.Size]) -> None:
    fast, slow = pair(**options)
    shape = (BATCH, STEPS, WIDTH) if options.get("batch_first") else (STEPS, BATCH, WIDTH)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    h = torch.randn(BATCH, N, dtype=torch.float64, requires_grad=True)
    layers = fast.num_layers * (2 if fast.bidirectional else 1)
    state = tuple(torch.randn(layers, BATCH, UNITS, dtype=torch.float64) for _ in range(2))
    for rest in ((), (state,)):
        found, expected = [], []
        for lstm, into in ((fast, found), (slow, expected)):
            torch.manual_seed(1)  # dropout
            into.extend(results(lstm, x, *rest, h=h))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 2 * layers


@needs_compiler
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (3, 1, 2, 1), (1, 3, 1, 5), (2, 7, 3, 17), (4, 0, 2, 3), (30, 33, 9, 31)], ids=str
)
def test_every_size(sizes: tuple[int, ...]) -> None:
    """Steps, examples, width, units; those that fill no vector of the processor among them."""
    steps, batch, width, units = sizes
    torch.manual_seed(0)
    fast = HyperLSTM(width, units, N, compiled=True).double()
    slow = copy.deepcopy(fast)
    slow.compiled = False
    x = torch.randn(steps, batch, width, dtype=torch.float64, requires_grad=True)
    h = torch.randn(batch, N, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(results(fast, x, h=h), results(slow, x, h=h), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_checkpointing_and_two_threads(compiled: bool) -> None:
    lstm = dict(zip((True, False), pair(), strict=True))[compiled]
    x = torch.randn(STEPS, BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
    h = torch.randn(BATCH, N, dtype=torch.float64, requires_grad=True)
    expected = results(lstm, x, h=h)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = results(lstm, x, h=h)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def again(x: Tensor, h: Tensor) -> Any:
        return lstm(x, h=h)

    y, (hidden, cell) = checkpoint(again, x, h, use_reentrant=False)
    total = y.square().sum() + (hidden * cell.sin()).sum()
    found = torch.autograd.grad(total, [x, h, *lstm.parameters()])
    torch.testing.assert_close(list(found), expected[3:], rtol=1e-12, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 4), (torch.float64, 4)])
def test_its_nonlinearities_are_exact_to_a_few_roundings_at_any_size(
    dtype: torch.dtype, roundings: int
) -> None:
    """One unit per number, one step from a cell of one: cell = σ(v) + σ(v) tanh(v), output = σ(v) tanh(cell).

    From a cell of zero, cell = σ(v) tanh(v): small numbers keep all their digits.
    """
    sizes = torch.logspace(-30, 3, 2001, dtype=dtype)
    v = torch.cat([-sizes, torch.zeros(1, dtype=dtype), sizes])
    units = len(v)
    zero, one = torch.zeros(4 * units, 1, dtype=dtype), torch.ones(1, units, dtype=dtype)
    found = native.lstm_layer(
        torch.zeros(1, 1, 1, dtype=dtype), (torch.zeros_like(one), one),
        (zero, zero, zero.T), (zero.expand(-1, units), zero.expand(-1, units), zero.T), v.repeat(4), compiled=True,
    )  # fmt: skip
    w = v.double()
    cell = w.sigmoid() * (1 + w.tanh())
    exact = (w.sigmoid() * cell.tanh(), cell)
    # far out, σ stops at the smallest e^x it forms, below any number that a sum could notice
    least = torch.finfo(torch.float32).eps ** 5
    # 1 + tanh(v) cancels for negative v, in any arithmetic: hence roundings of σ(v), not of the cell
    _, alone = native.lstm_layer(
        torch.zeros(1, 1, 1, dtype=dtype), (torch.zeros_like(one), torch.zeros_like(one)),
        (zero, zero, zero.T), (zero.expand(-1, units), zero.expand(-1, units), zero.T), v.repeat(4), compiled=True,
    )  # fmt: skip
    product = w.sigmoid() * w.tanh()
    error = (alone.flatten().double() - product).abs()
    assert (error <= 2 * roundings * torch.finfo(dtype).eps * product.abs() + least).all()
    for result, expected in zip(found, exact, strict=True):
        bound = roundings * torch.finfo(dtype).eps * w.sigmoid() + least
        assert ((result.flatten().double() - expected).abs() <= bound).all()


@needs_compiler
def test_numbers_that_are_none_stay_none() -> None:
    given = [a.detach() for a in arguments()]
    given[0][0, 1, 0] = torch.nan
    given[0][0, 2, 0] = torch.inf
    y, _ = layer(*given)
    expected, _ = layer(*given, compiled=False)
    assert torch.equal(y.isnan(), expected.isnan())
    assert y[:, 0].isfinite().all()


@needs_compiler
def test_the_graph_serves_twice_and_outputs_may_be_changed() -> None:
    given = arguments()
    y, cell = layer(*given)
    first = torch.autograd.grad(y.sum() + cell.sum(), given, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y.sum() + cell.sum(), given), first, rtol=0, atol=0)
    y, cell = layer(*given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.mul_(2).sum().backward()  # as of torch's LSTM: outputs are needed for the backward pass
    y, cell = layer(*given)
    cell.mul_(2).sum().backward()


@needs_compiler
@pytest.mark.parametrize("frozen", [range(3, 10), [0], [3], [4], [6], [7], [1, 2]], ids=str)
def test_some_gradients_alone(frozen: Sequence[int]) -> None:
    given = arguments()
    for i in frozen:
        given[i].requires_grad_(False)
    wanted = [a for a in given if a.requires_grad]
    found, expected = (
        torch.autograd.grad(layer(*given, compiled=compiled)[0].square().sum(), wanted)
        for compiled in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@needs_compiler
def test_what_c_cannot_take_is_taken_without(calls: list[torch.Size]) -> None:
    given = [a.detach() for a in arguments()]
    expected = layer(*given, compiled=False)[0]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given[0], torch.ones_like(given[0]))
        y = layer(dual, *given[1:])[0]
        assert forward_ad.unpack_dual(y).tangent is not None
        torch.testing.assert_close(forward_ad.unpack_dual(y).primal, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.func.grad(lambda x: layer(x, *given[1:])[0].sum())(given[0])
    x = given[0].clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(layer(x, *given[1:], compiled=False)[0].sum(), x)
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-12, atol=1e-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(*[a.float() for a in given])[0]
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.1)
    y = layer(*[a.bfloat16() for a in given])[0]
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.2)
    traced = make_fx(lambda x: layer(x, *given[1:])[0])(given[0])
    torch.testing.assert_close(traced(2 * given[0]), layer(2 * given[0], *given[1:], compiled=False)[0])
    broadcast = [*given[:4], given[4][:1], *given[5:]]
    torch.testing.assert_close(layer(*broadcast)[0], layer(*broadcast, compiled=False)[0])
    for i in (3, 4, 6, 7):
        with pytest.raises((RuntimeError, ValueError)):
            layer(*given[:i], given[i][:3], *given[i + 1 :])
    alone = [*given[:5], given[5][:1], *given[6:]]  # one row of coefficients for all examples
    torch.testing.assert_close(layer(*alone)[0], layer(*alone, compiled=False)[0])
    torch.testing.assert_close(layer(given[0], *[a.float() for a in given[1:3]], *given[3:])[0], expected)
    assert layer(given[0][:0], *given[1:])[0].shape == (0, BATCH, UNITS)  # no step
    assert calls == []
    torch.testing.assert_close(layer(*given)[0], expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 1


@needs_compiler
def test_layouts_that_c_cannot_read() -> None:
    """Negative views and saved tensors laid out by hooks in another way are put right first."""
    given = arguments()

    def gradients(given: list[Tensor], compiled: bool) -> list[Tensor]:
        y, cell = layer(*given, compiled=compiled)
        return list(torch.autograd.grad((y * cell).sum(), given))

    expected = gradients(given, False)

    def turned(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x

    with torch.autograd.graph.saved_tensors_hooks(turned, lambda x: x):
        torch.testing.assert_close(gradients(given, True), expected, rtol=1e-12, atol=1e-12)

    def negative(x: Tensor) -> Tensor:
        """The same numbers, as the imaginary part of a conjugate."""
        return torch.complex(torch.zeros_like(x), -x.detach()).conj().imag.requires_grad_()

    views = [negative(a) for a in given]
    assert all(a.is_neg() for a in views)
    torch.testing.assert_close(gradients(views, True), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_a_dual_number_after_the_layer(compiled: bool) -> None:
    given = arguments()
    head, moved = (torch.randn(STEPS, BATCH, UNITS, dtype=torch.float64) for _ in range(2))

    def gradients(head: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((layer(*given, compiled=compiled)[0].tanh() * head).sum(), given)

    with forward_ad.dual_level():
        found = gradients(forward_ad.make_dual(head, moved))
        tangents = [forward_ad.unpack_dual(g).tangent for g in found]
    torch.testing.assert_close(tangents, list(gradients(moved)), rtol=1e-12, atol=1e-12)


@needs_compiler
def test_cotangents_without_memory_and_hooks_that_change_the_dtype() -> None:
    given = arguments()
    y, cell = layer(*given)
    nothing = torch._efficientzerotensor(tuple(y.shape), dtype=y.dtype)
    found = torch.autograd.grad([y, cell], given, [nothing, torch.ones_like(cell)], retain_graph=True)
    expected = torch.autograd.grad([y, cell], given, [torch.zeros_like(y), torch.ones_like(cell)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.float, lambda x: x):
        y, _ = layer(*given)
    with pytest.raises(RuntimeError, match=r"changed the dtype|same dtype|scalar type"):
        torch.autograd.grad(y.sum(), given)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("case", ["state carried", "called twice", "state from x"])
def test_arguments_that_depend_on_each_other(case: str, compiled: bool) -> None:
    """A graph of the backward pass must not change what it computes; neither must many cotangents."""
    torch.manual_seed(0)
    lstm = HyperLSTM(UNITS, UNITS, N, compiled=compiled).double()
    for p in lstm.parameters():
        nn.init.normal_(p, std=0.5)
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


class Model(nn.Module):
    """A small language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.lstm = nn.LSTM(WIDTH, UNITS, 2, batch_first=True)
        self.output = nn.Linear(UNITS, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.lstm(self.embedding(tokens))[0])


@needs_compiler
def test_best_response_hands_it_on(calls: list[torch.Size]) -> None:
    torch.manual_seed(0)
    fast = best_response(Model().double(), N, compiled=True)
    for p in fast.response_parameters().values():
        nn.init.normal_(p, std=0.3)
    slow = copy.deepcopy(fast)
    slow.module.lstm.compiled = False
    tokens, h = torch.randint(11, (BATCH, STEPS)), torch.randn(BATCH, N, dtype=torch.float64)

    def evaluate(response: BestResponse) -> list[Tensor]:
        y = response(tokens, h)
        return [y, *torch.autograd.grad(y.square().sum(), list(response.parameters()))]

    torch.testing.assert_close(evaluate(fast), evaluate(slow), rtol=1e-12, atol=1e-12)
    assert len(calls) == 2
    plain = fast.export(torch.zeros(N, dtype=torch.float64))
    assert type(plain.lstm) is nn.LSTM
    assert "compiled" not in vars(plain.lstm)


def test_one_warning_without_a_compiler(afresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    given = [a.detach() for a in arguments()]
    message = r"compiled=True needs a C compiler\. Got: false failed: .* LSTMs run without it, more slowly; install gcc"
    with pytest.warns(UserWarning, match=message):
        found = layer(*given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(layer(*given), found, rtol=0, atol=0)
    torch.testing.assert_close(found, layer(*given, compiled=False), rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_products_kept_by_selective_checkpointing(compiled: bool) -> None:
    """The context holds on to results of ``mm``, which then may not be changed in place."""
    lstm = dict(zip((True, False), pair(), strict=True))[compiled]
    x = torch.randn(STEPS, BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
    h = torch.randn(BATCH, N, dtype=torch.float64)
    wanted = [x, *lstm.parameters()]
    expected = torch.autograd.grad(lstm(x, h=h)[0].square().sum(), wanted)

    def policy(context: Any, operation: Any, *rest: Any, **options: Any) -> CheckpointPolicy:
        kept = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    y = checkpoint(
        lambda x: lstm(x, h=h)[0],
        x,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, policy),
    )
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), wanted), expected, rtol=1e-12, atol=1e-12
    )
