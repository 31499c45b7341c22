import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_nested.callbacks import GeneratorEMA
from lightning_nested.games import joint_gradient
from lightning_nested.modules import (
    R1,
    BigGAN,
    BigGANNetworks,
    BigGANObjective,
    DiffAugment,
    Execution,
    GameLoop,
    GANModule,
    GradientPenalty,
    NonSaturating,
    Sampling,
    Wasserstein,
)
from lightning_nested.optim import ComplexAdam
from tests.modules.gan.tiny import data, module, same, tensors, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*sync_dist", "ignore:Checkpoint directory", "ignore:You defined a `validation_step`"
)


class Steps(Callback):
    """Which optimizer steps on which batch."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, str]] = []
        self.batches = -1

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1

    def on_before_optimizer_step(self, _: Trainer, pl_module: Any, optimizer: Any) -> None:
        generator = pl_module.running_players["generator"].optimizer.optimizer
        name = "G" if optimizer is generator else "D"
        self.steps.append((self.batches, name))


def test_four_discriminator_steps_with_fresh_batches_then_the_generator() -> None:
    steps, gan = Steps(), module()
    trainer(max_steps=2, callbacks=[steps]).fit(gan, data())
    assert steps.steps == [(0, "D"), (1, "D"), (2, "D"), (3, "D"), (3, "G"),
                           (4, "D"), (5, "D"), (6, "D"), (7, "D"), (7, "G")]  # fmt: skip
    assert gan.game_updates == 2


@pytest.mark.parametrize("reuse_fakes", [False, True])
def test_equals_a_hand_written_loop(reuse_fakes: bool) -> None:
    """Two rounds of 4 D steps and a G step, hinge, Adam(2e-4, (0, .999)), one D forward for real and fake."""
    gan = module(objective=BigGANObjective(reuse_fakes=reuse_fakes), execution=Execution(channels_last=False))
    generator, discriminator = copy.deepcopy(gan.generator), copy.deepcopy(gan.discriminator)
    loader = DataLoader(list(zip(*load(32), strict=True)), batch_size=4)  # type: ignore[arg-type]
    torch.manual_seed(7)
    trainer(max_steps=2).fit(gan, loader)

    torch.manual_seed(7)
    batches = list(loader)
    adam = partial(torch.optim.Adam, lr=2e-4, betas=(0.0, 0.999))
    optimizers = adam(discriminator.parameters()), adam(generator.parameters())
    for k, (images, labels) in enumerate(batches):
        z, y = torch.randn(4, 8), torch.randint(10, (4,))
        fakes = generator(z, y)
        scores = discriminator(torch.cat((images, fakes.detach())), torch.cat((labels, y)))
        loss = functional.relu(1 - scores[:4]).mean() + functional.relu(1 + scores[4:]).mean()
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        if k % 4 == 3:
            if not reuse_fakes:
                z, y = torch.randn(4, 8), torch.randint(10, (4,))
                fakes = generator(z, y)
            optimizers[1].zero_grad()
            (-discriminator(fakes, y).mean()).backward()
            optimizers[1].step()
    same(tensors(gan.generator), tensors(generator))
    same(tensors(gan.discriminator), tensors(discriminator))


def load(size: int) -> tuple[Tensor, Tensor]:
    source = data(size)
    source.setup()
    return source.train_images, source.train_labels


@pytest.mark.parametrize(
    "options",
    [
        {"objective": BigGANObjective(loss=NonSaturating(), regularizers=(R1(weight=0.1, every=2),))},
        {"objective": BigGANObjective(loss=Wasserstein(), regularizers=(GradientPenalty(),))},
        {"objective": BigGANObjective(augment=DiffAugment(), reuse_fakes=True)},
        {"loop": GameLoop(accumulate_grad_batches=2, gradient_clip_val=1.0)},
        {"discriminator_optimizer": partial(ComplexAdam, lr=2e-4)},
        {"networks": BigGANNetworks(width=2, latent_dim=8, shared_dim=3, hierarchical=True, attention=(8,))},
        {"trainer": {"precision": "bf16-mixed"}, "objective": BigGANObjective(augment=DiffAugment())},
        {"trainer": {"precision": "bf16-true"}, "objective": BigGANObjective(augment=DiffAugment())},
        {"trainer": {"precision": "64-true"}, "objective": BigGANObjective(regularizers=(R1(),))},
    ],
    ids=["r1", "wgan-gp", "diffaugment", "accumulation", "complex", "hierarchical", "bf16", "half", "double"],
)
def test_every_option_trains(options: dict[str, Any]) -> None:
    extra = options.get("trainer", {})
    gan = module(**{k: v for k, v in options.items() if k != "trainer"})
    before = tensors(gan)
    trainer(max_steps=2, limit_val_batches=1, **extra).fit(gan, data(80))
    for player in ("generator.blocks.0.conv1.weight", "discriminator.blocks.0.conv1.weight"):
        assert not torch.equal(gan.state_dict()[player], before[player])
    assert all(value.isfinite().all() for value in gan.state_dict().values())


def test_second_derivatives_are_of_the_plain_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled ones have none: penalties and spectra do without, everything else takes them."""
    calls: list[str] = []

    def compiled(network: nn.Module) -> Any:
        def forward(*inputs: Tensor) -> Tensor:
            calls.append(type(network).__name__)
            return network(*inputs)  # type: ignore[no-any-return]

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    objective = BigGANObjective(regularizers=(R1(),), reuse_fakes=True)
    gan = module(objective=objective, execution=Execution(compile=True))
    trainer(max_steps=1).fit(gan, data(16))
    # Each D step: the generator, the discriminator; the penalty's forward is not among them.
    assert calls == ["Generator", "Discriminator"] * 4 + ["Discriminator"]
    calls.clear()
    with gan.joint_evaluation(["discriminator", "generator"]):
        gan.player_losses(["discriminator", "generator"], load(4))
    assert calls == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look
def test_compiled_networks_train_to_the_same_weights() -> None:
    def run(compile_: bool) -> dict[str, Tensor]:
        gan = module(execution=Execution(compile=compile_))
        torch.manual_seed(3)
        trainer(max_steps=2).fit(gan, data())
        return tensors(gan)

    plain, compiled = run(False), run(True)
    assert set(plain) == set(compiled)
    for name, value in plain.items():
        # Adam's first steps are ± the rate whatever a gradient's size: a rounding error can turn one around.
        torch.testing.assert_close(value.float(), compiled[name].float(), rtol=0, atol=2e-3)


class Save(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        # Lightning's launcher sends them with the memory they lie in, and a pipe holds 64 KiB.
        assert all(value.untyped_storage().nbytes() <= 8 for value in trainer.callback_metrics.values())
        (ema,) = (c for c in trainer.callbacks if isinstance(c, GeneratorEMA))
        state = {"weights": tensors(pl_module), "ema": ema.state_dict(), "updates": pl_module.game_updates}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("discriminator", [torch.optim.Adam, ComplexAdam])
def test_two_processes_stay_bit_equal(discriminator: Any, tmp_path: Path) -> None:
    """8 updates of the width-4 model, four epochs: batch statistics differ between the processes, no state does."""
    betas = (0.8, 0.999) if discriminator is ComplexAdam else (0.0, 0.999)
    gan = module(
        networks=BigGANNetworks(width=4, latent_dim=16),
        discriminator_optimizer=partial(discriminator, lr=2e-4, betas=betas),
    )
    callbacks = [Save(tmp_path), GeneratorEMA(decay=0.9, start=3)]
    fit = trainer(max_steps=8, max_epochs=-1, devices=2, strategy="ddp_fork", callbacks=callbacks)
    fit.fit(gan, data(64, batch_size=4))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["updates"] == second["updates"] == 8
    same(first["weights"], second["weights"])
    assert first["ema"]["updates"] == 8
    same(first["ema"]["average"], second["ema"]["average"])
    moved = first["weights"]["generator.norm.running_mean"]
    assert moved.abs().sum() > 0


class At(Callback):
    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches, self.seen = path, batches, 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.batches:
            trainer.save_checkpoint(self.path)


class Resumable:
    """A loader that goes on where it was."""

    def __init__(self, size: int = 12) -> None:
        self.images, self.labels = load(4 * size)
        self.size, self.position = size, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        if self.position == self.size:  # Lightning does not ask for the end of a loader that has a length
            self.position = 0
        while self.position < self.size:
            self.position += 1
            rows = slice(4 * self.position - 4, 4 * self.position)
            yield self.images[rows], self.labels[rows]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@pytest.mark.parametrize("discriminator", [torch.optim.Adam, ComplexAdam])
def test_resuming_inside_a_cycle_of_four_is_bit_exact(discriminator: Any, tmp_path: Path) -> None:
    def run(path: Path | None, *callbacks: Callback) -> tuple[BigGAN, GeneratorEMA]:
        gan = module(discriminator_optimizer=partial(discriminator, lr=2e-4, betas=(0.5, 0.999)))
        ema = GeneratorEMA(decay=0.9, start=1)
        torch.manual_seed(5 + (path is None))  # the resumed process has another state at its start
        fit = trainer(max_epochs=2, callbacks=[ema, *callbacks])
        fit.fit(gan, Resumable(), ckpt_path=path, weights_only=True)
        return gan, ema

    whole, whole_ema = run(None, At(tmp_path / "open.ckpt", 6))  # one round, then two of four D steps
    resumed, resumed_ema = run(tmp_path / "open.ckpt")
    assert resumed.game_updates == whole.game_updates == 6
    same(tensors(whole), tensors(resumed))
    assert resumed_ema.updates == whole_ema.updates == 6
    same(whole_ema.averaged().state_dict(), resumed_ema.averaged().state_dict())


def test_logs_losses_details_and_singular_values(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    fit = trainer(max_steps=2, log_every_n_steps=1, logger=CSVLogger(tmp_path))
    fit.fit(module(), data())
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    for name in (
        "discriminator_loss", "generator_loss", "real_score", "fake_score", "images_per_second",
        "generator_gradient_norm", "discriminator_gradient_norm",
        "singular_value/generator.blocks.0.conv1", "singular_value/discriminator.embedding",
    ):  # fmt: skip
        assert name in header


def test_players_are_differentiable_twice_with_frozen_vectors() -> None:
    """What a spectrum needs: a joint gradient with its graph, on float64 networks."""
    gan = module(execution=Execution(channels_last=False)).double()
    images, labels = load(4)

    def losses(parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        weight, bias = parameters
        z, y = torch.ones(4, 8, dtype=torch.float64), torch.arange(4)
        with gan.one_function():
            fake = torch.func.functional_call(gan.generator, {"blocks.0.conv1.weight": weight}, (z, y))
            score = partial(torch.func.functional_call, gan.discriminator, {"linear.weight": bias})
            real, fake = score((images.double(), labels)), score((fake, y))
        return -fake.mean(), (functional.softplus(-real) + functional.softplus(fake)).mean()

    players = (gan.generator.blocks[0].conv1.weight, gan.discriminator.linear.weight)
    gradient = joint_gradient(losses, players)
    twice = joint_gradient(losses, players)
    for a, b in zip(gradient, twice, strict=True):
        assert torch.equal(a, b)


def test_validation_logs_losses_and_moves_nothing() -> None:
    gan = module()
    before = tensors(gan)
    fit = trainer(limit_val_batches=None)
    (found,) = fit.validate(gan, data(), verbose=False)
    assert set(found) == {
        f"val_{n}" for n in ("discriminator_loss", "generator_loss", "real_score", "fake_score")
    }
    same(tensors(gan), before)


def test_predict_writes_an_image_of_each_label(tmp_path: Path) -> None:
    gan = module(sampling=Sampling(batch_size=25, truncation=0.5))
    fit = trainer(default_root_dir=tmp_path)
    batches: Any = fit.predict(gan)
    assert sum(map(len, batches)) == 100
    files = sorted(tmp_path.rglob("*.png"))
    assert len(files) == 100
    assert {path.parent.name for path in files} == {f"class_{k}" for k in range(10)}
    with Image.open(tmp_path / "samples" / "class_0" / "0_00000_0000.png") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    torch.testing.assert_close(pixels.float(), (batches[0][0] + 1) * 127.5, atol=0.51, rtol=0)
    again: Any = trainer(default_root_dir=tmp_path).predict(gan, data())  # the labels of a datamodule
    assert len(again[0]) == 4


def test_files_of_several_loaders_and_of_mixtures(tmp_path: Path) -> None:
    gan = module()
    mixtures = torch.eye(10)[:4] * 0.5 + 0.05
    zeros = torch.zeros(4, dtype=torch.long)
    loaders: Any = [DataLoader(x, batch_size=2) for x in (zeros, zeros, mixtures)]  # type: ignore[arg-type]
    first, second, mixed = trainer(default_root_dir=tmp_path).predict(gan, loaders)  # type: ignore[misc]
    assert len(list(tmp_path.rglob("class_0/*.png"))) == 8
    assert len(list(tmp_path.rglob("mixtures/*.png"))) == 4
    assert not torch.equal(first[0], second[0])
    assert mixed[1].shape == (2, 3, 32, 32)


def test_samples_of_drawn_classes() -> None:
    gan = module()
    images = gan.sample(5)
    assert images.shape == (5, 3, 32, 32)
    assert torch.equal(images, gan.sample(5))
    assert isinstance(gan, GANModule)


def test_interpolations() -> None:
    gan = module()
    images = gan.interpolate(0, 9, steps=4)
    assert images.shape == (4, 3, 32, 32)
    assert torch.equal(images, gan.interpolate(0, 9, steps=4))
    assert not torch.equal(images, gan.interpolate(0, 9, steps=4, seed=1))


def test_a_class_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"labels must lie in 0 … 9. Got 10"):
        module().sample(torch.tensor([10]))
    with pytest.raises(ValueError, match="Set num_classes of both networks"):
        # Before anything is computed: on a GPU the networks themselves do not look.
        module().real_data((torch.zeros(1, 3, 32, 32), torch.tensor([10])))
    few = module(networks=BigGANNetworks(width=2, latent_dim=8, num_classes=3))
    with pytest.raises(ValueError, match="Set num_classes of both networks"):
        trainer(max_steps=1).fit(few, data())


def test_images_that_do_not_fit() -> None:
    with pytest.raises(MisconfigurationException, match=r"shape \(N, 3, 32, 32\). Got \(4, 1, 32, 32\)"):
        trainer(max_steps=1).fit(module(), data(channels=1))
    with pytest.raises(ValueError, match="resolution must be one of"):
        module(networks=BigGANNetworks(resolution=28))


def test_data_without_labels() -> None:
    with pytest.raises(ValueError, match=r"needs batches \(data, labels\)"):
        module().real_data(torch.zeros(2, 3, 32, 32))


def test_fakes_cannot_be_reused_where_batches_are_not() -> None:
    with pytest.raises(ValueError, match="set reuse_batch=True in it, or reuse_fakes=False"):
        module(objective=BigGANObjective(reuse_fakes=True), loop=GameLoop(accumulate_grad_batches=2))


def test_sync_batchnorm_on_cpu() -> None:
    fit = trainer(max_steps=1, sync_batchnorm=True, devices=2, strategy="ddp_fork")
    with pytest.raises(Exception, match=r"sync_batchnorm needs GPUs.*leave it out"):  # of a child process
        fit.fit(module(), data())


def test_adam_takes_an_integer_zero_from_yaml() -> None:
    from lightning_nested.modules.gan.biggan import float_betas

    optimizer = float_betas(partial(torch.optim.Adam, lr=1e-3, betas=(0, 0.999)))([torch.zeros(1)])
    assert optimizer.defaults["betas"] == (0.0, 0.999)
