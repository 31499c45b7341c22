"""Unrolled hypergradients against closed forms, central differences, and each other."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from lightning_nested.hypergradient.schedule import Schedule, cheapest, graph_size
from lightning_nested.hypergradient.unrolled import unrolled_hypergradient

Tensors = tuple[Tensor, ...]
WAYS: dict[str, dict[str, Any]] = {
    "reverse": {},
    "forward": {"mode": "forward"},
    "auto": {"checkpoint": True},
    "sqrt": {"checkpoint": "sqrt"},
    "tight": {"checkpoint": 1},
    "roomy": {"checkpoint": 8},
}
ways = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient(loss: Tensor, params: Tensors) -> Tensors:
    return torch.autograd.grad(loss, params, create_graph=True)


def central_difference(
    step: Callable[..., Tensors], outer: Callable[..., Tensor], w: Tensors, h: Tensors, num_steps: int
) -> Tensors:
    """Element by element, with the step run forwards only."""

    def value(hparams: Tensors) -> float:
        torch.manual_seed(7)
        state = w
        for t in range(num_steps):
            state = tuple(x.detach().requires_grad_() for x in state)
            state = step(state, hparams, t)
        return outer(state, hparams).item()

    result = []
    for i, x in enumerate(h):
        slopes = []
        for k in range(x.numel()):
            e = torch.zeros(x.numel(), dtype=x.dtype)
            e[k] = 1e-5
            e = e.reshape(x.shape)
            ahead, behind = (value((*h[:i], x + s * e, *h[i + 1 :])) for s in (1, -1))
            slopes.append((ahead - behind) / 2e-5)
        result.append(torch.tensor(slopes, dtype=x.dtype).reshape(x.shape))
    return tuple(result)


# --- closed forms -------------------------------------------------------------------------------

DIAGONAL = double(1, 10)


def quadratic_step(params: Tensors, hparams: Tensors, t: int) -> Tensors:
    """SGD with rate 0.1 on ½wᵀAw − λᵀw."""
    (w,), (target,) = params, hparams
    (g,) = gradient((0.5 * w * DIAGONAL * w - target * w).sum(), (w,))
    return (w - 0.1 * g,)


def distance(params: Tensors, hparams: Tensors) -> Tensor:
    return 0.5 * ((params[0] - 1) ** 2).sum()


@ways
@pytest.mark.parametrize(("num_steps", "first"), [(1, -0.09), (5, -0.2418115599), (50, -0.0051272138)])
def test_quadratic_has_the_closed_form(num_steps: int, first: float, options: dict[str, Any]) -> None:
    (g,) = unrolled_hypergradient(
        quadratic_step, distance, (double(0, 0),), (double(1, 1),), num_steps=num_steps, **options
    )
    torch.testing.assert_close(g, double(first, -0.09), rtol=0, atol=1e-10)


@ways
def test_learning_rate_is_seen(options: dict[str, Any]) -> None:
    def sgd(params: Tensors, hparams: Tensors, t: int) -> Tensors:
        (g,) = gradient(0.5 * (params[0] ** 2).sum(), params)
        return (params[0] - hparams[0] * g,)

    (g,) = unrolled_hypergradient(
        sgd, lambda p, h: 0.5 * (p[0] ** 2).sum(), (double(1),), (double(0.1),), num_steps=1, **options
    )
    torch.testing.assert_close(g, double(-0.9), rtol=1e-14, atol=0)


@ways
@pytest.mark.parametrize("num_steps", [1, 4, 13])
def test_steps_at_the_optimum_are_the_neumann_series(
    num_steps: int, options: dict[str, Any], normal: Any
) -> None:
    a = normal(4, 4)
    A, b, alpha = a @ a.T / 4 + torch.eye(4, dtype=torch.float64), normal(4), 0.1

    def step(params: Tensors, hparams: Tensors, t: int) -> Tensors:
        (w,), (target,) = params, hparams
        (g,) = gradient(0.5 * w @ A @ w - target @ w, (w,))
        return (w - alpha * g,)

    optimum = torch.linalg.solve(A, b)
    (g,) = unrolled_hypergradient(step, distance, (optimum,), (b,), num_steps=num_steps, **options)
    # The mixed derivative ∂²L/∂w∂λ is −I, so the series is α Σ_{k<K} (I − αA)ᵏ ∂L_V/∂w.
    term, series = optimum - 1, torch.zeros(4, dtype=torch.float64)
    for _ in range(num_steps):
        series, term = series + alpha * term, term - alpha * A @ term
    torch.testing.assert_close(g, series, rtol=1e-13, atol=1e-15)


# --- networks, against central differences ------------------------------------------------------


def mlp(w: Tensors, x: Tensor) -> Tensor:
    return torch.tanh(x @ w[0]) @ w[1]


def layer_norm(w: Tensors, x: Tensor) -> Tensor:
    return functional.layer_norm(x @ w[0], (5,)).tanh() @ w[1]


def batch_norm(w: Tensors, x: Tensor) -> Tensor:
    return functional.batch_norm(x @ w[0], None, None, training=True).tanh() @ w[1]


def attention(w: Tensors, x: Tensor) -> Tensor:
    y = (x @ w[0]).unsqueeze(0)
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(y, y, y.tanh()).squeeze(0) @ w[1]


def dropout(w: Tensors, x: Tensor) -> Tensor:
    return functional.dropout(torch.tanh(x @ w[0]), 0.4) @ w[1]


class Momentum:
    """Heavy ball: params are weights and velocities, λ is (rate, momentum, a log decay per weight tensor)."""

    def __init__(self, net: Callable[[Tensors, Tensor], Tensor], normal: Any) -> None:
        self.net, self.x, self.y = net, normal(12, 3), normal(12, 2)
        self.xv, self.yv = normal(12, 3), normal(12, 2)
        weights = (0.5 * normal(3, 5), 0.5 * normal(5, 2))
        self.params = (*weights, *(torch.zeros_like(w) for w in weights))
        self.hparams = (double(0.1)[0], double(0.5), double(-2.0, -3.0))

    def step(self, params: Tensors, hparams: Tensors, t: int) -> Tensors:
        weights, velocities = params[:2], params[2:]
        rate, momentum, log_decay = hparams
        loss = functional.mse_loss(self.net(weights, self.x), self.y)
        loss = loss + 0.5 * sum(d.exp() * (w**2).sum() for d, w in zip(log_decay, weights, strict=True))
        velocities = tuple(momentum * v + g for v, g in zip(velocities, gradient(loss, weights), strict=True))
        return (*(w - rate * v for w, v in zip(weights, velocities, strict=True)), *velocities)

    def outer(self, params: Tensors, hparams: Tensors) -> Tensor:
        # A direct dependence on λ as well, and no random numbers of its own.
        net = mlp if self.net is dropout else self.net
        return functional.mse_loss(net(params, self.xv), self.yv) + 0.01 * hparams[2].pow(2).sum()


@ways
@pytest.mark.parametrize("net", [mlp, layer_norm, batch_norm, attention, dropout])
def test_network_matches_central_differences(net: Any, options: dict[str, Any], normal: Any) -> None:
    case = Momentum(net, normal)
    expected = central_difference(case.step, case.outer, case.params, case.hparams, 9)
    torch.manual_seed(7)
    got = unrolled_hypergradient(case.step, case.outer, case.params, case.hparams, num_steps=9, **options)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-9)


@ways
def test_random_stream_ends_where_plain_training_ends(options: dict[str, Any], normal: Any) -> None:
    case = Momentum(dropout, normal)
    torch.manual_seed(7)
    state = tuple(p.requires_grad_() for p in case.params)
    for t in range(9):
        state = case.step(state, case.hparams, t)
    expected = torch.rand(3)
    torch.manual_seed(7)
    unrolled_hypergradient(case.step, case.outer, case.params, case.hparams, num_steps=9, **options)
    assert torch.equal(torch.rand(3), expected)


# --- truncation ---------------------------------------------------------------------------------


@ways
def test_truncated_equals_unrolling_the_last_steps(options: dict[str, Any], normal: Any) -> None:
    case = Momentum(mlp, normal)
    state = tuple(p.clone().requires_grad_() for p in case.params)
    for t in range(4):
        state = case.step(state, case.hparams, t)
    tail = unrolled_hypergradient(case.step, case.outer, state, case.hparams, num_steps=5)
    got = unrolled_hypergradient(
        case.step, case.outer, case.params, case.hparams, num_steps=9, truncate=5, **options
    )
    for g, e in zip(got, tail, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-15)


def test_truncation_error_decays_at_the_rate_of_the_inner_optimizer() -> None:
    def truncated(steps: int | None) -> Tensor:
        return unrolled_hypergradient(
            quadratic_step, distance, (double(0, 0),), (double(1, 2),), num_steps=60, truncate=steps
        )[0]

    errors = [(truncated(k) - truncated(None))[0].abs() for k in (10, 11, 12)]
    # α Σ_{k≥K} (1 − α)ᵏ: the error shrinks by 1 − α = 0.9 a step, but for the end of the series at 60 steps.
    assert errors[1] / errors[0] == pytest.approx(0.9, rel=1e-2)
    assert errors[2] / errors[1] == pytest.approx(0.9, rel=1e-2)
    assert torch.equal(truncated(60), truncated(None))
    assert torch.equal(truncated(1000), truncated(None))


def test_steps_receive_their_number() -> None:
    seen: list[int] = []

    def step(params: Tensors, hparams: Tensors, t: int) -> Tensors:
        seen.append(t)
        return quadratic_step(params, hparams, t)

    unrolled_hypergradient(step, distance, (double(0, 0),), (double(1, 1),), num_steps=4, truncate=2)
    assert seen == [0, 1, 2, 3]


# --- memory -------------------------------------------------------------------------------------


def peak_mib(work: Callable[[], object], path: Path) -> float:
    """Peak of live tensor bytes that ``work`` allocates, from the profiler's allocation records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    trace = path / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak / 2**20


class Classifier:
    """An MLP of the given widths in float32, one decay per weight, batch 256."""

    def __init__(self, *widths: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(256, widths[0], generator=generator)
        self.y = torch.randint(widths[-1], (256,), generator=generator)
        self.params = tuple(
            torch.randn(b, a, generator=generator) / a**0.5 if matrix else torch.zeros(b)
            for a, b in pairwise(widths)
            for matrix in (True, False)
        )
        self.hparams = tuple(torch.full_like(p, 1e-4) for p in self.params)

    def loss(self, w: Tensors, hparams: Tensors) -> Tensor:
        x = self.x
        for i in range(0, len(w), 2):
            x = functional.linear(x if i == 0 else torch.tanh(x), w[i], w[i + 1])
        return functional.cross_entropy(x, self.y)

    def step(self, w: Tensors, hparams: Tensors, t: int) -> Tensors:
        decay = sum((d * p * p).sum() for d, p in zip(hparams, w, strict=True))
        grads = gradient(self.loss(w, hparams) + 0.5 * decay, w)
        return tuple(p - 0.1 * g for p, g in zip(w, grads, strict=True))

    def hypergradient(self, num_steps: int, **options: Any) -> Tensors:
        return unrolled_hypergradient(
            self.step, self.loss, self.params, self.hparams, num_steps=num_steps, **options
        )


@pytest.mark.slow
def test_one_hundred_steps_of_a_real_network_fit_75_mib(tmp_path: Path) -> None:
    network = Classifier(784, 500, 500, 10)  # 648 010 weights and as many decays: 2.5 MiB a copy
    assert peak_mib(lambda: network.hypergradient(100, checkpoint=True), tmp_path) <= 75


def test_memory_grows_more_slowly_than_the_steps(tmp_path: Path) -> None:
    network = Classifier(64, 128, 10)
    peaks = {
        (way, steps): peak_mib(
            lambda way=way, steps=steps: network.hypergradient(steps, checkpoint=way), tmp_path
        )
        for way in (False, True)
        for steps in (25, 100)
    }
    assert peaks[False, 100] > 3 * peaks[False, 25]
    assert peaks[True, 100] < 2 * peaks[True, 25]
    assert peaks[True, 100] < peaks[False, 100] / 4
    for a, b in zip(network.hypergradient(25), network.hypergradient(25, checkpoint=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("graph", [1.0, 2.3, 3.31, 17.5])
@pytest.mark.parametrize("length", [1, 2, 7, 100, 311])
def test_schedule_stays_within_its_memory_and_its_reruns(graph: float, length: int) -> None:
    schedule = cheapest(length, graph=graph, reruns=1.25)
    stack, covered, run_again = [(0, length, schedule.memory)], [], 0
    while stack:
        start, steps, memory = stack.pop()
        if cut := schedule.first_segment(steps, memory):
            run_again += cut
            stack += [(start, cut, memory), (start + cut, steps - cut, memory - 1)]
        else:
            assert steps * graph <= memory  # what the states on the stack leave free
            covered += list(range(start + steps - 1, start - 1, -1))
    assert covered == list(range(length - 1, -1, -1))
    assert run_again == schedule.reruns(length) <= 1.25 * length


@pytest.mark.parametrize("checkpoint", [True, 1, 6, "sqrt"])
def test_steps_run_as_often_as_the_schedule_says(checkpoint: Any) -> None:
    calls = 0

    def step(params: Tensors, hparams: Tensors, t: int) -> Tensors:
        nonlocal calls
        calls += 1
        return quadratic_step(params, hparams, t)

    start, hparams = (double(0, 0).requires_grad_(),), (double(1, 1).requires_grad_(),)
    graph = graph_size(lambda: quadratic_step(start, hparams, 0), start, hparams)
    unrolled_hypergradient(step, distance, start, hparams, num_steps=30, checkpoint=checkpoint)
    if checkpoint == "sqrt":
        assert calls == 24 + 30  # √30 → segments of 6; the last is not run again
    elif checkpoint is True:
        assert calls == 1 + cheapest(30, graph=graph, reruns=1.25).reruns(30) + 30
    else:
        assert calls == 1 + Schedule(memory=checkpoint, graph=graph).reruns(30) + 30


def test_step_built_on_torch_func_can_be_checkpointed(normal: Any) -> None:
    x, y = normal(6, 3), normal(6)

    def step(params: Tensors, hparams: Tensors, t: int) -> Tensors:
        grad = torch.func.grad(lambda w: functional.mse_loss(x @ w, y) + hparams[0] * (w**2).sum())(params[0])
        return (params[0] - 0.1 * grad,)

    full, checkpointed = (
        unrolled_hypergradient(step, distance, (normal(3),), (double(0.3)[0],), num_steps=1, checkpoint=c)
        for c in (False, True)
    )
    assert full[0].isfinite()
    assert checkpointed[0].isfinite()
    w = normal(3)
    a, b = (
        unrolled_hypergradient(step, distance, (w,), (double(0.3)[0],), num_steps=20, checkpoint=c)[0]
        for c in (False, 5)
    )
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


# --- edges --------------------------------------------------------------------------------------


@ways
def test_unused_hyperparameter_gets_zeros_and_inputs_stay_as_they_are(options: dict[str, Any]) -> None:
    w, target, unused = double(0, 0), double(1, 1), torch.ones(2, 3)

    def step(params: Tensors, hparams: Tensors, t: int) -> Tensors:
        return quadratic_step(params, hparams[:1], t)

    with torch.no_grad():
        got = unrolled_hypergradient(step, distance, (w,), (target, unused), num_steps=5, **options)
    assert got[0].abs().min() > 0
    assert torch.equal(got[1], torch.zeros(2, 3))
    assert not any(x.requires_grad for x in (w, target, unused, *got))
    assert torch.equal(w, double(0, 0))


@ways
def test_buffers_that_pass_through_are_allowed(options: dict[str, Any]) -> None:
    def step(params: Tensors, hparams: Tensors, t: int) -> Tensors:
        return (*quadratic_step(params[:1], hparams, t), params[1], torch.ones_like(params[2]))

    start = (double(0, 0), double(3), double(4))
    (g,) = unrolled_hypergradient(step, distance, start, (double(1, 1),), num_steps=5, **options)
    torch.testing.assert_close(g, double(-0.2418115599, -0.09), rtol=0, atol=1e-10)


@ways
def test_nothing_reached_is_an_error(options: dict[str, Any]) -> None:
    def step(params: Tensors, hparams: Tensors, t: int) -> Tensors:
        return tuple(p.detach() for p in quadratic_step(params, hparams, t))

    def outer(params: Tensors, hparams: Tensors) -> Tensor:
        return distance(tuple(p.requires_grad_() for p in params), hparams)

    with pytest.raises(ValueError, match="create_graph=True"):
        unrolled_hypergradient(step, outer, (double(0, 0),), (double(1, 1),), num_steps=3, **options)


@ways
def test_divergence_is_an_error(options: dict[str, Any]) -> None:
    def step(params: Tensors, hparams: Tensors, t: int) -> Tensors:
        return (params[0] ** 3 * hparams[0],)

    with pytest.raises(FloatingPointError, match="not finite after 30 steps"):
        unrolled_hypergradient(step, distance, (double(3),), (double(2),), num_steps=30, **options)


@ways
def test_exploding_derivative_is_an_error(options: dict[str, Any]) -> None:
    def outer(params: Tensors, hparams: Tensors) -> Tensor:
        return (params[0] - params[0].detach()).sqrt().sum()

    with pytest.raises(FloatingPointError, match=r"hypergradient of hparams\[0\] is not finite"):
        unrolled_hypergradient(
            quadratic_step, outer, (double(0, 0),), (double(1, 1),), num_steps=3, **options
        )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_steps": 0}, "num_steps must be >= 1. Got 0"),
        ({"truncate": 0}, "truncate must be >= 1"),
        ({"mode": "backward"}, "'reverse' or 'forward'. Got 'backward'"),
        ({"checkpoint": "log"}, "'sqrt'. Got 'log'"),
        ({"checkpoint": -2}, "checkpoint must be >= 1"),
        ({"checkpoint": True, "mode": "forward"}, "checkpoint must be False"),
        ({"params": ()}, "params must be a sequence of at least one tensor"),
        ({"hparams": ()}, "hparams must be a sequence of at least one tensor"),
        ({"hparams": double(1, 1)}, "Got Tensor"),
        ({"params": (torch.tensor(3),)}, r"params\[0\] must be a floating-point tensor. Got torch.int64"),
        ({"step": lambda p, h, t: (*p, *p)}, "as many as params. Got 2 at t=0"),
        ({"step": lambda p, h, t: (p[0][:1] * h[0][:1],)}, r"params\[0\], \(2,\)"),
        ({"step": lambda p, h, t: (p[0].float(),)}, "Got \\(2,\\) torch.float32 at t=0"),
        ({"outer_loss": lambda p, h: p[0]}, "one element"),
        ({"outer_loss": lambda p, h: 3.0}, "Got float"),
        ({"outer_loss": lambda p, h: torch.ones(())}, "neither params nor hparams"),
    ],
)
def test_bad_input_names_cause_and_cure(change: dict[str, Any], match: str) -> None:
    arguments: dict[str, Any] = {
        "step": quadratic_step,
        "outer_loss": distance,
        "params": (double(0, 0),),
        "hparams": (double(1, 1),),
        "num_steps": 2,
    }
    with pytest.raises(ValueError, match=match):
        unrolled_hypergradient(**arguments | change)
