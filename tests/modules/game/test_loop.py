"""Order of steps and batches, accumulation and clipping, against hand-written loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.modules import GameLoop
from tests.modules.game.games import BATCHES, GAN, Bilinear, Sums, fails, points, same, sgd, steps, tensors
from tests.trainers import trainer


def test_alternating_steps_take_fresh_batches_and_see_new_parameters() -> None:
    module = Bilinear(steps_per_player={"x": 3})
    fit = trainer()
    fit.fit(module, steps(8))
    order = ["x", "x", "x", "y", "x", "x", "x", "y"]
    assert module.calls == [(name, k + 1.0) for k, name in enumerate(order)]
    x, y = 1.0, 0.5
    for k, name in enumerate(order):
        if name == "x":
            x -= 0.1 * (k + 1) * y
        else:
            y += 0.1 * (k + 1) * x
    assert module.values() == pytest.approx((x, y), rel=1e-14)
    assert (module.game_updates, fit.global_step, module.gradient_evaluations) == (2, 2, 8)


def test_simultaneous_gradients_are_of_one_point_and_one_batch() -> None:
    module = Bilinear(update="simultaneous")
    fit = trainer()
    fit.fit(module, steps(4))
    assert module.calls == [(name, k) for k in (1.0, 2.0, 3.0, 4.0) for name in "xy"]
    x, y = 1.0, 0.5
    for k in range(1, 5):
        x, y = x - 0.1 * k * y, y + 0.1 * k * x
    assert module.values() == pytest.approx((x, y), rel=1e-14)
    assert (module.game_updates, fit.global_step) == (4, 4)


def test_a_batch_can_be_used_twice() -> None:
    module = Bilinear(steps_per_player={"x": 2}, loop=GameLoop(reuse_batch=True))
    trainer().fit(module, steps(4))
    assert module.calls == [("x", 1.0), ("x", 2.0), ("y", 2.0), ("x", 3.0), ("x", 4.0), ("y", 4.0)]
    assert module.game_updates == 2


def test_accumulated_batches_are_one_large_batch() -> None:
    """Batches of 5, 5 and, at the epoch's end, 5 alone: the mean over the batches of a step."""

    def run(size: int, **kw: Any) -> GAN:
        module = GAN(steps_per_player=None, update="simultaneous", **kw)
        module.on_game_update = lambda: losses.append(dict(module._steps.losses))  # type: ignore[method-assign]
        trainer(max_epochs=2).fit(module, DataLoader(points(15), size))
        return module

    losses: list[dict[str, Tensor]] = []
    accumulated, whole = run(5, loop=GameLoop(accumulate_grad_batches=2)), run(10)
    assert accumulated.game_updates == whole.game_updates == 4
    for mine, other in zip(losses[:4], losses[4:], strict=True):
        same(mine, other, rtol=1e-12)
    same(tensors(accumulated), tensors(whole), rtol=1e-12)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_that_of_torch_for_each_player(algorithm: Any) -> None:
    clip = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[algorithm]

    def step(limits: dict[str, float]) -> GAN:
        module = GAN(
            optimizer=sgd(1.0),
            optimizers=None,
            update="simultaneous",
            steps_per_player=None,
            loop=GameLoop(gradient_clip_val=limits or None, gradient_clip_algorithm=algorithm),
        )
        trainer().fit(module, DataLoader(points(10), 10))
        return module

    start, free, limited = tensors(GAN()), step({}), step({"generator": 0.01})
    for name, player in limited.players().items():
        moved = {key: nn.Parameter(start[f"{name}.{key}"]) for key, _ in player.named_parameters()}
        for key, p in moved.items():
            p.grad = start[f"{name}.{key}"] - tensors(free)[f"{name}.{key}"]
        if name == "generator":
            clip(list(moved.values()), 0.01)
        for key, p in moved.items():
            actual = start[f"{name}.{key}"] - tensors(limited)[f"{name}.{key}"]
            assert p.grad is not None
            torch.testing.assert_close(actual, p.grad, rtol=1e-7, atol=1e-15)


def test_fakes_can_be_reused() -> None:
    """One forward of the generator for two steps, and the same gradients as with its own fakes of equal latents."""

    def run(reuse: bool) -> tuple[int, GAN]:
        module = GAN(steps_per_player=None, update="simultaneous", reuse_fakes=reuse)
        calls = []
        module.generator.register_forward_hook(lambda *_: calls.append(0))
        trainer().fit(module, DataLoader(points(30), 10))
        return len(calls), module

    (once, shared), (twice, separate) = run(True), run(False)
    assert (once, twice) == (3, 6)
    same(tensors(shared), tensors(separate), rtol=1e-12)


def test_bf16_runs() -> None:
    module = GAN(steps_per_player={"discriminator": 2}).float()
    data = TensorDataset(points(60, 2).tensors[0].float())
    dtypes = set()
    module.discriminator[0].register_forward_hook(lambda *args: dtypes.add(args[2].dtype))
    trainer(precision="bf16-mixed").fit(module, DataLoader(data, 10))
    assert (module.game_updates, dtypes) == (2, {torch.bfloat16})
    assert all(p.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps_per_player": {"x": 0}}, r"at least 1 for every player. Got 0 for 'x'"),
        ({"steps_per_player": {"x": 2}, "update": "simultaneous"}, "use update='alternating'"),
        ({"update": "both"}, "'simultaneous' or 'alternating'. Got 'both'"),
    ],
)
def test_wrong_arguments(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Bilinear(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"accumulate_grad_batches": 0}, "at least 1. Got 0"),
        ({"accumulate_grad_batches": 1.5}, "whole number. Got 1.5"),
        ({"gradient_clip_val": 0.0}, "must be positive"),
        ({"gradient_clip_val": {"x": "much"}}, "finite number or None. Got {'x': 'much'}"),
        ({"gradient_clip_val": {"x": -1.0}}, "must be positive"),
        ({"gradient_clip_algorithm": "max"}, "'norm' or 'value'. Got 'max'"),
        ({"reuse_batch": True, "accumulate_grad_batches": 2}, "set it to 1, or reuse_batch=False"),
    ],
)
def test_wrong_loop(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GameLoop(**options)


def test_an_unknown_player_in_the_schedule() -> None:
    fails(Bilinear(steps_per_player={"z": 2}), ValueError, r"must name players. Got \['z'\].*\['x', 'y'\]")


@pytest.mark.parametrize("count", [1.5, 2.0, "2", True])
def test_steps_per_player_are_whole_numbers(count: Any) -> None:
    with pytest.raises(ValueError, match=r"steps_per_player must be .* whole number or None. Got {'x': "):
        Sums(steps_per_player={"x": count})


@pytest.mark.parametrize("shape", [(), (3,)])
def test_gradients_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    """Of a + b autograd answers with one tensor for both; of a sum with an expanded number."""

    class InPlace(Sums):
        def __init__(self) -> None:
            super().__init__()
            for player in (self.x, self.y):
                player.a, player.b = (nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in "ab")

        def player_loss(self, name: str, batch: Any) -> Tensor:
            return self.players()[name]().sum()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for p in optimizer.param_groups[0]["params"]:
                p.grad.mul_(0.5)

    module = InPlace()
    trainer().fit(module, BATCHES)
    for p in module.parameters():
        torch.testing.assert_close(p.detach(), torch.full(shape, -0.1, dtype=torch.float64))
