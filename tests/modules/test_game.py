"""GameModule against hand-written loops, under two processes, resumed, and with wrong input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.modules import GameLoop, GameModule, GANModule
from lightning_nested.optim import ComplexSGD, Extragradient

Optimizer = Callable[[Any], torch.optim.Optimizer]


def sgd(lr: float, **options: Any) -> Optimizer:
    return lambda params: torch.optim.SGD(params, lr=lr, **options)


def trainer(folder: Path | None = None, **options: Any) -> Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "devices": 1, **options}
    return Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **options,
    )


def steps(n: int) -> DataLoader[Any]:
    """n batches; batch k holds the number k + 1."""
    return DataLoader(TensorDataset(torch.arange(1.0, n + 1, dtype=torch.float64)), batch_size=1)


class Scalar(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value], dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.value


class Bilinear(GameModule):
    """min over x, max over y of the batch's number times xy."""

    def __init__(self, **kw: Any) -> None:
        if not {"optimizer", "optimizers"} & set(kw):
            kw["optimizer"] = sgd(0.1)
        super().__init__(**kw)
        self.x, self.y = Scalar(1.0), Scalar(0.5)
        self.calls: list[tuple[str, float]] = []

    def players(self) -> dict[str, nn.Module]:
        return {"x": self.x, "y": self.y}

    def player_loss(self, name: str, batch: Any) -> Tensor:
        self.calls.append((name, float(batch[0])))
        product = batch[0].mean() * (self.x() * self.y()).sum()
        return product if name == "x" else -product

    def values(self) -> tuple[float, float]:
        return self.x.value.item(), self.y.value.item()


# ---- the schedule


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


# ---- networks: processes, resuming


def mlp(inputs: int, outputs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


class GAN(GANModule):
    """A small GAN whose latents come with the batch if it has four columns, else from the global stream."""

    def __init__(self, **kw: Any) -> None:
        optimizers = {"generator": adam(0.02), "discriminator": adam(0.03)}
        kw = {"optimizers": optimizers, "steps_per_player": {"discriminator": 4}, **kw}
        super().__init__(mlp(2, 2, 0), mlp(2, 1, 1), latent_dim=2, **kw)

    def player_loss(self, name: str, batch: Any) -> Tensor:
        self.latents = batch[0][:, 2:]
        return super().player_loss(name, (batch[0][:, :2],))

    def sample_latents(self, count: int) -> Tensor:
        return self.latents if self.latents.numel() else super().sample_latents(count)


def adam(lr: float, **options: Any) -> Optimizer:
    return lambda params: torch.optim.Adam(params, lr=lr, betas=(0.5, 0.9), **options)


def points(n: int, width: int = 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(n, width, generator=generator, dtype=torch.float64))


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=rtol * 1e-3)


class Save(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        state = {"weights": tensors(pl_module), "updates": pl_module.game_updates, "draw": torch.rand(3)}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


class Split(GAN):
    """Each process takes its half of every batch, so that the global batch is that of a single process."""

    def player_loss(self, name: str, batch: Any) -> Tensor:
        rank, n = self.trainer.global_rank, self.trainer.world_size
        return super().player_loss(name, (batch[0][rank::n],))


@pytest.mark.parametrize(
    ("update", "loop"),
    [
        ("alternating", GameLoop(gradient_clip_val=0.3)),
        ("simultaneous", GameLoop(accumulate_grad_batches=2, gradient_clip_val={"generator": 0.2})),
    ],
)
def test_two_processes_with_half_the_batch_are_one_with_the_whole(
    update: Any, loop: GameLoop, tmp_path: Path
) -> None:
    def run(**options: Any) -> Split:
        each = {"discriminator": 4} if update == "alternating" else None
        module = Split(update=update, loop=loop, steps_per_player=each)
        fit = trainer(max_epochs=-1, max_steps=20, use_distributed_sampler=False, **options)
        fit.fit(module, DataLoader(points(70), batch_size=10))
        return module

    run(devices=2, strategy="ddp_fork", callbacks=[Save(tmp_path)])
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    same(first["weights"], second["weights"])
    assert first["updates"] == second["updates"] == 20
    assert not torch.equal(first["draw"], second["draw"]), "each process draws its own latents"
    same(first["weights"], tensors(run()), rtol=1e-10)


class Resumable:
    """A loader that goes on where it was, so that a run can be resumed inside an epoch."""

    def __init__(self) -> None:
        self.position = 0

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Any:
        while self.position < 7:
            self.position += 1
            yield [points(70, 2).tensors[0][10 * self.position - 10 : 10 * self.position]]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class At(Callback):
    """Saves a checkpoint after some batches."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches, self.seen = path, batches, 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.batches:
            trainer.save_checkpoint(self.path)


GAMES: dict[str, Callable[[], GAN]] = {
    "turns": lambda: GAN(scheduler=lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)),
    "turns, accumulated": lambda: GAN(loop=GameLoop(accumulate_grad_batches=2)),
    "together": lambda: GAN(update="simultaneous", steps_per_player=None, reuse_fakes=True),
}


def assert_same_run(a: tuple[GAN, Trainer], b: tuple[GAN, Trainer]) -> None:
    same(tensors(a[0]), tensors(b[0]))
    for mine, other in zip(a[1].optimizers, b[1].optimizers, strict=True):
        torch.testing.assert_close(mine.state_dict(), other.state_dict(), rtol=0, atol=0)
    clocks = [(m.game_updates, m.gradient_evaluations, t.global_step) for m, t in (a, b)]
    assert clocks[0] == clocks[1]
    assert a[1].current_epoch == b[1].current_epoch
    assert clocks[0][0] == clocks[0][2]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize("limit", [{}, {"max_steps": 1000}], ids=["epochs", "steps"])
@pytest.mark.parametrize("name", GAMES)
def test_resuming_at_an_epochs_end_is_bit_exact(name: str, limit: dict[str, int], tmp_path: Path) -> None:
    """Seven batches an epoch and five a round: every epoch ends inside a round."""

    def run(epochs: int, path: Path | None = None, **options: Any) -> tuple[GAN, Trainer]:
        torch.manual_seed(path is None)  # a resumed run must not depend on the seed it is started with
        module, fit = GAMES[name](), trainer(max_epochs=epochs, **limit, **options)
        torch.manual_seed(5 + (path is None))
        loader = DataLoader(points(70, 2), batch_size=10, shuffle=True)
        fit.fit(module, loader, ckpt_path=path, weights_only=True)
        return module, fit

    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_on_train_epoch_end=True)
    run(2, enable_checkpointing=True, callbacks=[save])
    assert_same_run(run(4, tmp_path / "epoch=1.ckpt"), run(4))


@pytest.mark.parametrize("batches", [3, 9, 11])
@pytest.mark.parametrize("name", GAMES)
def test_resuming_inside_an_epoch_is_bit_exact(name: str, batches: int, tmp_path: Path) -> None:
    def run(path: Path | None = None, *callbacks: Callback) -> tuple[GAN, Trainer]:
        module, fit = GAMES[name](), trainer(max_epochs=4, callbacks=list(callbacks))
        torch.manual_seed(5 + (path is None))
        fit.fit(module, Resumable(), ckpt_path=path, weights_only=True)
        return module, fit

    whole = run(None, At(tmp_path / "open.ckpt", batches))
    assert_same_run(run(tmp_path / "open.ckpt"), whole)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_two_processes_resume_with_their_own_random_numbers(tmp_path: Path) -> None:
    def run(epochs: int, path: Path | None, folder: str, **options: Any) -> None:
        (tmp_path / folder).mkdir()
        fit = trainer(
            max_epochs=epochs,
            devices=2,
            strategy="ddp_fork",
            callbacks=[Save(tmp_path / folder), *options.pop("callbacks", [])],
            **options,
        )
        torch.manual_seed(5 + (path is None))
        loader = DataLoader(points(70, 2), batch_size=5, shuffle=True)
        fit.fit(GAMES["turns"](), loader, ckpt_path=path, weights_only=True)

    save = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_on_train_epoch_end=True)
    run(1, None, "first", enable_checkpointing=True, callbacks=[save])
    run(2, tmp_path / "saved" / "epoch=0.ckpt", "second")
    run(2, None, "whole")
    for rank in (0, 1):
        a, b = (torch.load(tmp_path / folder / f"{rank}.pt") for folder in ("second", "whole"))
        same(a["weights"], b["weights"])
        assert torch.equal(a["draw"], b["draw"])


# ---- what the Trainer refuses in manual optimization


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


def test_schedulers_step_with_game_updates() -> None:
    rates: list[list[float]] = []

    class Watch(Bilinear):
        def on_game_update(self) -> None:
            rates.append([o.param_groups[0]["lr"] for o in self.trainer.optimizers])

    halve: Any = lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)  # noqa: E731
    module = Watch(steps_per_player={"x": 2}, optimizer=sgd(0.1), schedulers={"y": halve})
    trainer().fit(module, steps(15))
    assert [r[0] for r in rates] == [0.1] * 5
    assert [r[1] for r in rates] == [0.1, 0.1, 0.05, 0.05, 0.025]


def test_the_trainers_clock_counts_game_updates(tmp_path: Path) -> None:
    class Logger(CSVLogger):
        logged: ClassVar[list[tuple[int, set[str]]]] = []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.logged.append((step or 0, set(metrics)))

    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit = trainer(
        tmp_path,
        max_epochs=-1,
        max_steps=8,
        enable_checkpointing=True,
        callbacks=[save],
        logger=Logger(tmp_path),
        log_every_n_steps=4,
    )
    module = Bilinear(steps_per_player={"x": 4}, optimizer=sgd(0.01))
    fit.fit(module, steps(7))
    assert (module.game_updates, fit.global_step, len(module.calls)) == (8, 8, 40)
    assert {path.name for path in (tmp_path / "saved").glob("*.ckpt")} == {"step=3.ckpt", "step=6.ckpt"}
    assert Logger.logged == [(4, {"x_loss", "y_loss"}), (8, {"x_loss", "y_loss"})]
    assert fit.callback_metrics["game_updates"] == 8


def test_bf16_runs() -> None:
    module = GAN(steps_per_player={"discriminator": 2}).float()
    data = TensorDataset(points(60, 2).tensors[0].float())
    dtypes = set()
    module.discriminator[0].register_forward_hook(lambda *args: dtypes.add(args[2].dtype))
    trainer(precision="bf16-mixed").fit(module, DataLoader(data, 10))
    assert (module.game_updates, dtypes) == (2, {torch.bfloat16})
    assert all(p.dtype == torch.float32 for p in module.parameters())


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


# ---- wrong input


def fails(module: GameModule, error: type[Exception], match: str, n: int = 4, **options: Any) -> None:
    before = tensors(module)
    with pytest.raises(error, match=match):
        trainer(**options).fit(module, steps(n))
    same(tensors(module), before)  # nothing is lost


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
        ({"accumulate_grad_batches": 1.5}, "whole number of at least 1. Got 1.5"),
        ({"gradient_clip_val": 0.0}, "must be positive"),
        ({"gradient_clip_val": {"x": "much"}}, "must be positive, or None. Got {'x': 'much'}"),
        ({"gradient_clip_val": {"x": -1.0}}, "must be positive"),
        ({"gradient_clip_algorithm": "max"}, "'norm' or 'value'. Got 'max'"),
        ({"reuse_batch": True, "accumulate_grad_batches": 2}, "set it to 1, or reuse_batch=False"),
    ],
)
def test_wrong_loop(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GameLoop(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"optimizers": {"x": sgd(0.1), "z": sgd(0.1)}}, r"optimizers must name players. Got \['z'\]"),
        ({"optimizers": {"x": sgd(0.1)}}, r"must have an optimizer. Got none for 'y'"),
        ({"schedulers": {"z": None}}, r"schedulers must name players. Got \['z'\]"),
        (
            {"loop": GameLoop(gradient_clip_val={"z": 1.0})},
            r"gradient_clip_val must name players. Got \['z'\]",
        ),
    ],
)
def test_names_that_are_no_players(options: Any, match: str) -> None:
    fails(Bilinear(**options), MisconfigurationException, match)


def test_an_unknown_player_in_the_schedule() -> None:
    fails(Bilinear(steps_per_player={"z": 2}), ValueError, r"must name players. Got \['z'\].*\['x', 'y'\]")


def test_shared_parameters() -> None:
    module = Bilinear()
    module.y.value = module.x.value
    fails(module, MisconfigurationException, r"must not share parameters.*'x.value' in both 'x' and 'y'")


def test_a_loss_that_does_not_depend_on_its_player() -> None:
    class Wrong(Bilinear):
        def player_loss(self, name: str, batch: Any) -> Tensor:
            return (self.y() ** 2).sum()

    fails(Wrong(), MisconfigurationException, "loss of 'x' must depend on its parameters")


def test_a_loss_without_graph_or_not_scalar() -> None:
    class Wrong(Bilinear):
        def player_loss(self, name: str, batch: Any) -> Tensor:
            return self.answer

    for answer, match in (
        (torch.zeros(2, requires_grad=True), r"scalar tensor for 'x'. Got shape \(2,\)"),
        (torch.zeros(()), "with its graph for 'x'"),
        (1.0, "Got float"),
    ):
        module = Wrong()
        module.answer = answer  # type: ignore[assignment]
        fails(module, MisconfigurationException, match)


@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_a_loss_that_is_not_finite_changes_no_player(update: Any) -> None:
    class Bad(Bilinear):
        def player_loss(self, name: str, batch: Any) -> Tensor:
            loss = super().player_loss(name, batch)
            return loss / 0 if name == "y" and self.game_updates == 1 else loss

    module = Bad(update=update)
    good: list[tuple[float, float]] = []
    module.on_player_step = lambda name: good.append(module.values())  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=r"loss of 'y'.*must be finite.*after 1 game updates"):
        trainer().fit(module, steps(8))
    assert module.values() == good[-1]
    assert module.game_updates == 1


def test_optimizers_of_ones_own_in_any_order() -> None:
    class Own(Bilinear):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.y.parameters(), 0.2), torch.optim.SGD(self.x.parameters(), 0.1)]

    module = Own(update="simultaneous")
    trainer().fit(module, steps(1))
    assert module.values() == pytest.approx((1 - 0.1 * 0.5, 0.5 + 0.2), rel=1e-14)


@pytest.mark.parametrize(
    ("held", "match"),
    [
        ([["x", "y"]], r"exactly one player. Got a SGD with parameters of \['x', 'y'\]"),
        ([["x"], ["x"], ["y"]], "Got two for 'x'"),
        ([["x"]], r"Got none for \['y'\]"),
        ([["x"], ["y"], ["other"]], r"Got a SGD with parameters of \['no player'\]"),
    ],
)
def test_optimizers_that_do_not_fit_the_players(held: list[list[str]], match: str) -> None:
    class Own(Bilinear):
        def __init__(self) -> None:
            super().__init__()
            self.other = Scalar(3.0)

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD([getattr(self, n).value for n in names], 0.1)  # a parameter may be held twice
                for names in held
            ]

    fails(Own(), MisconfigurationException, match)


def test_sharded_and_scaled_training_is_refused() -> None:
    module = Bilinear()
    fit = trainer()
    fit.precision_plugin.scaler = object()
    with pytest.raises(MisconfigurationException, match="use 'bf16-mixed'"):
        fit.fit(module, steps(1))


# ---- two gradients an update


class Normed(GANModule):
    """Batch norm in the generator, latents from the global stream."""

    def __init__(self, optimizer: Optimizer, **kw: Any) -> None:
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
        super().__init__(generator, mlp(2, 1, 1), latent_dim=2, optimizer=optimizer, **kw)
        self.draws: list[float] = []

    def sample_latents(self, count: int) -> Tensor:
        latents = super().sample_latents(count)
        self.draws.append(float(latents.sum()))
        return latents


@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_extragradient_looks_ahead_with_the_same_latents_and_moves_buffers_once(update: Any) -> None:
    module = Normed(lambda p: Extragradient(p, lr=0.1), update=update)
    torch.manual_seed(1)
    trainer().fit(module, DataLoader(points(20, 2), 10))
    plain = Normed(sgd(0.1), update=update)
    torch.manual_seed(1)
    trainer().fit(plain, DataLoader(points(20, 2), 10))
    half = len(module.draws) // 2
    per_step = 2 if update == "simultaneous" else 1  # evaluations of the generator in a step
    steps_of = [module.draws[i : i + 2 * per_step] for i in range(0, 2 * half, 2 * per_step)]
    assert all(draws[:per_step] == draws[per_step:] for draws in steps_of)
    assert [x for draws in steps_of for x in draws[:per_step]] == plain.draws
    assert module.generator[1].num_batches_tracked == plain.generator[1].num_batches_tracked
    assert not any("anchor" in s for o in module.running_players.values() for s in o.optimizer.state.values())


def test_a_second_gradient_that_is_not_finite_changes_no_player() -> None:
    class Bad(Bilinear):
        def player_loss(self, name: str, batch: Any) -> Tensor:
            loss = super().player_loss(name, batch)
            return loss / 0 if len(self.calls) == 8 else loss

    module = Bad(update="simultaneous", optimizer=lambda p: Extragradient(p, lr=0.1, weight_decay=0.1))
    good: list[tuple[float, float]] = []
    module.on_game_update = lambda: good.append(module.values())  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="no player has stepped"):
        trainer().fit(module, steps(8))
    assert module.game_updates == len(good) == 1
    assert module.values() == good[-1]


def test_settings_that_two_gradients_exclude() -> None:
    two: Any = lambda p: Extragradient(p, lr=0.1)  # noqa: E731
    fails(
        Bilinear(update="simultaneous", optimizers={"x": two, "y": sgd(0.1)}),
        MisconfigurationException,
        "must need equally many gradients",
    )
    fails(
        Bilinear(optimizer=two, loop=GameLoop(accumulate_grad_batches=2)),
        MisconfigurationException,
        "cannot accumulate over several",
    )
    mixed = Bilinear(optimizers={"x": two, "y": sgd(0.1)})  # in turns it is well defined
    trainer().fit(mixed, steps(2))
    assert (mixed.game_updates, mixed.gradient_evaluations) == (1, 3)


def test_momentum_out_of_range_is_refused_before_anything_moves() -> None:
    for options, match in (({"momentum": 1.0}, "Got 1.0"), ({"phase": 4.0}, "Got 4.0")):
        fails(Bilinear(optimizer=lambda p, o=options: ComplexSGD(p, lr=0.1, **o)), ValueError, match)


def test_lightnings_weight_averaging_counts_game_updates() -> None:
    averaging = EMAWeightAveraging(decay=0.5, update_every_n_steps=2)
    module = Bilinear(steps_per_player={"x": 4})
    kept: list[tuple[float, float]] = []
    module.on_game_update = lambda: kept.append(module.values())  # type: ignore[method-assign]
    trainer(callbacks=[averaging]).fit(module, steps(20))  # four game updates
    assert len(kept) == 4
    first, third = kept[0], kept[2]  # Lightning counts steps from 0; its first average is a copy
    expected = tuple(0.5 * a + 0.5 * b for a, b in zip(first, third, strict=True))
    assert module.values() == pytest.approx(expected, rel=1e-12)  # the average replaces the last weights
