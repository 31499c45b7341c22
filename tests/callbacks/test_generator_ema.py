from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_nested.callbacks import GeneratorEMA
from lightning_nested.modules import Anneal, GANModule
from tests.modules.gan.tiny import data, module, same, tensors, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:You defined a `validation_step`", "ignore:.*callback states"
)


class Record(Callback):
    """The generator after each of its updates."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, _: Trainer, pl_module: Any, *__: Any) -> None:
        if pl_module.game_updates > len(self.states):
            self.states.append(tensors(pl_module.generator))


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_the_recurrence(buffers: Any) -> None:
    ema, record = GeneratorEMA(decay=0.7, start=2, buffers=buffers), Record()
    gan = module()
    trainer(max_steps=6, max_epochs=-1, callbacks=[ema, record]).fit(gan, data())
    assert ema.updates == len(record.states) == 6
    parameters = {name for name, _ in gan.generator.named_parameters()}
    found = ema.state_dict()["average"]
    for name in found:
        expected = record.states[1][name].double()  # plain copies up to update 2
        for state in record.states[2:]:
            copied = not state[name].is_floating_point() or (buffers == "copy" and name not in parameters)
            expected = state[name].double() if copied else 0.7 * expected + 0.3 * state[name].double()
        # float32 arithmetic against float64: a few roundings per step.
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_an_annealed_decay() -> None:
    """A copy at update 1, then d = 0.4, 0.6, 0.8 at the updates 2 to 4, and 0.8 from there on."""
    ema, record, gan = GeneratorEMA(Anneal(0.0, 0.8, 4), start=1), Record(), module()
    trainer(max_steps=5, max_epochs=-1, callbacks=[ema, record]).fit(gan, data())
    found = ema.state_dict()["average"]
    for name, _ in gan.generator.named_parameters():
        expected = record.states[0][name].double()
        for state, decay in zip(record.states[1:], (0.4, 0.6, 0.8, 0.8), strict=True):
            expected = decay * expected + (1 - decay) * state[name].double()
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        GeneratorEMA(Anneal(0.5, 1.0, 3))


class Look(Callback):
    def __init__(self, ema: GeneratorEMA) -> None:
        self.ema, self.seen = ema, {}

    def on_validation_epoch_start(self, _: Trainer, pl_module: Any) -> None:
        self.seen["validate"] = self.ema.stands_in, tensors(pl_module.generator)

    def on_test_epoch_start(self, _: Trainer, pl_module: Any) -> None:
        self.seen["test"] = self.ema.stands_in, tensors(pl_module.generator)

    def on_predict_epoch_start(self, _: Trainer, pl_module: Any) -> None:
        self.seen["predict"] = self.ema.stands_in, tensors(pl_module.generator)


def test_stands_in_for_evaluation_and_steps_back(tmp_path: Path) -> None:
    ema, gan = GeneratorEMA(decay=0.9, start=0), module()
    look = Look(ema)
    fit = trainer(
        max_steps=3,
        callbacks=[ema, look],
        limit_val_batches=1,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    fit.fit(gan, data(12))
    raw = tensors(gan)
    averaged = dict(ema.averaged().named_parameters())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    same(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"], raw)
    for stage in ("validate", "test", "predict"):
        fresh_ema, fresh = GeneratorEMA(decay=0.9, start=0), module()
        look = Look(fresh_ema)
        run = trainer(callbacks=[fresh_ema, look], limit_val_batches=1, default_root_dir=tmp_path)
        source = {} if stage == "predict" else {"datamodule": data(12)}
        getattr(run, stage)(fresh, ckpt_path=tmp_path / "x.ckpt", weights_only=True, **source)
        stood_in, seen = look.seen[stage]
        assert stood_in
        for name, value in averaged.items():
            assert torch.equal(seen[name], value), name
        assert not fresh_ema.stands_in
        same(tensors(fresh), raw)  # spectral vectors and running statistics too


def test_spectral_norm_of_the_average_has_unit_size() -> None:
    """Averaged unit vectors are short: without matching, σ is too small and the weights too large."""
    ema = GeneratorEMA(decay=0.9, start=0)
    gan = module()
    trainer(max_steps=8, max_epochs=-1, callbacks=[ema]).fit(gan, data())
    average = ema.averaged()
    layer = average.blocks[0].conv1  # type: ignore[union-attr,index]
    torch.testing.assert_close(layer.u.norm(), torch.ones(()))
    assert not average.training
    assert average(torch.zeros(1, 8), torch.tensor([0])).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norms_of_torch_have_unit_size_too(norm: Any, tmp_path: Path) -> None:
    """Evaluated within ``fit``, exported, and stepped back from with the raw values."""
    torch.manual_seed(0)
    generator = nn.Sequential(norm(nn.Linear(4, 16)), nn.ReLU(), norm(nn.Linear(16, 2)))
    sizes: list[float] = []

    class Measured(GANModule):
        def validation_step(self, batch: Tensor, _: int) -> None:
            self.generator(torch.zeros(1, 4))  # the older norm computes its weight in forward
            sizes.extend(torch.linalg.matrix_norm(layer.weight, ord=2).item() for layer in generator[::2])

    gan = Measured(generator, nn.Linear(2, 1), latent_dim=4, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    ema, inside = GeneratorEMA(decay=0.95, start=0), SaveInside(tmp_path / "inside.ckpt")
    run = trainer(callbacks=[ema, inside], max_steps=40, limit_val_batches=1, val_check_interval=40)
    loader = torch.utils.data.DataLoader(torch.randn(320, 2), batch_size=4)
    run.fit(gan, loader, loader)
    raw = tensors(gan)
    averaged = ema.averaged()
    averaged(torch.zeros(1, 4))
    sizes += [torch.linalg.matrix_norm(layer.weight, ord=2).item() for layer in averaged[::2]]  # type: ignore[index]
    # Two at each of three validations and two at the end; torch's own is at 1.01 in training.
    assert len(sizes) == 8
    assert sizes == pytest.approx([1.0] * 8, abs=0.02)
    same(torch.load(tmp_path / "inside.ckpt", weights_only=True)["state_dict"], raw)
    with ema.swapped(gan):
        assert any(not torch.equal(value, raw[name]) for name, value in tensors(gan).items())
    same(tensors(gan), raw)
    # A network that was trained before, whose older norm holds a graph, can be given a new callback.
    trainer(callbacks=[GeneratorEMA()], max_steps=1, max_epochs=1).fit(gan, loader)


def test_an_exception_puts_the_raw_weights_back() -> None:
    class Fail(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            raise RuntimeError("in the middle")

    ema, gan = GeneratorEMA(start=0), module()
    before = tensors(gan)
    run = trainer(callbacks=[ema, Fail()], limit_val_batches=1)
    with pytest.raises(RuntimeError, match="in the middle"):
        run.validate(gan, data(12))
    assert not ema.stands_in
    same(tensors(gan), before)


def test_other_modules_and_automatic_optimization() -> None:
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Linear(2, 1)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.generator(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    ema = GeneratorEMA(decay=0.5, start=1)
    loader = torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=2)
    trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[ema]).fit(Plain(), loader)
    assert ema.updates == 2  # accumulated batches do not count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay must lie in \[0, 1\)"),
        ({"start": -1}, "start must be at least 0"),
        ({"buffers": "skip"}, "'average' or 'copy'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratorEMA(**options)


def test_wrong_modules() -> None:
    with pytest.raises(MisconfigurationException, match="must name a network"):
        trainer(max_steps=1, callbacks=[GeneratorEMA(module="painter")]).fit(module(), data())
    with pytest.raises(RuntimeError, match="no average yet"):
        GeneratorEMA().averaged()


# ---- checkpoints


def checkpoint(path: Path, *callbacks: Callback, **options: Any) -> tuple[Any, Trainer]:
    """A module trained for two updates, and the checkpoint written."""
    gan = module()
    fit = trainer(max_steps=2, callbacks=list(callbacks), **options)
    fit.fit(gan, data(40))
    fit.save_checkpoint(path)
    return gan, fit


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_checkpoint_without_an_average_is_evaluated_as_it_is(tmp_path: Path) -> None:
    """Not with the weights that the module was made with."""
    gan, _ = checkpoint(tmp_path / "x.ckpt")
    ema = GeneratorEMA()
    look, fresh = Look(ema), module()
    run = trainer(callbacks=[ema, look], limit_val_batches=1)
    with pytest.warns(UserWarning, match="no average of this callback.*raw weights are evaluated"):
        run.validate(fresh, data(12), ckpt_path=tmp_path / "x.ckpt", weights_only=True, verbose=False)
    _, seen = look.seen["validate"]
    for name, value in gan.generator.named_parameters():
        assert torch.equal(seen[name], value), name


class SaveInside(Callback):
    """As SLURM's signal does it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def test_a_checkpoint_made_during_validation_holds_both(tmp_path: Path) -> None:
    """Raw weights in the module's part, the average in the callback's, as in one made after it."""
    ema = GeneratorEMA(decay=0.9, start=0)
    inside = SaveInside(tmp_path / "inside.ckpt")
    options = {"limit_val_batches": 1, "val_check_interval": 8, "num_sanity_val_steps": 0}
    checkpoint(tmp_path / "after.ckpt", ema, inside, **options)
    first, second = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("inside", "after"))
    same(first["state_dict"], second["state_dict"])
    (average,), (expected,) = (
        [state for key, state in found["callbacks"].items() if "GeneratorEMA" in key]
        for found in (first, second)
    )
    assert average["updates"] == expected["updates"] == 2
    same(average["average"], expected["average"])
    weight = "blocks.0.conv1.weight"
    assert not torch.equal(average["average"][weight], first["state_dict"][f"generator.{weight}"])


def test_double_precision_is_kept_through_a_checkpoint(tmp_path: Path) -> None:
    ema = GeneratorEMA(decay=0.9, start=0)
    checkpoint(tmp_path / "x.ckpt", ema, precision="64-true", limit_val_batches=1)
    again = GeneratorEMA(decay=0.9, start=0)
    run = trainer(callbacks=[again], precision="64-true", limit_val_batches=1)
    run.validate(module(), data(12), ckpt_path=tmp_path / "x.ckpt", weights_only=True, verbose=False)
    assert next(again.averaged().parameters()).dtype == torch.float64
    same(again.averaged().state_dict(), ema.averaged().state_dict())


def test_half_precision_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"Got torch.bfloat16; use precision='bf16-mixed'"):
        trainer(max_steps=1, precision="bf16-true", callbacks=[GeneratorEMA()]).fit(module(), data())


def test_training_after_a_validation_goes_on() -> None:
    """Stand-alone validation runs in inference mode, whose tensors cannot be averaged into."""
    ema, gan = GeneratorEMA(decay=0.9, start=0), module()
    run = trainer(callbacks=[ema], max_steps=2, limit_val_batches=1, precision="64-true")
    run.validate(gan, data(40), verbose=False)
    run.fit(gan, data(40))
    assert ema.updates == 2


# ---- taken home


def spectral_gan() -> GANModule:
    """A generator with batch norm and spectral norm, whose vectors must fit the averaged weights."""
    torch.manual_seed(2)
    generator = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), parametrizations.spectral_norm(nn.Linear(6, 2))
    )
    return GANModule(generator, nn.Linear(2, 1), latent_dim=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.2))


def trained(path: Path, *averages: GeneratorEMA) -> GANModule:
    gan = spectral_gan()
    fit = trainer(max_steps=5, max_epochs=-1, callbacks=averages)
    fit.fit(gan, torch.utils.data.DataLoader(torch.randn(40, 2) + 3, batch_size=4))
    fit.save_checkpoint(path)
    return gan


def test_the_average_is_taken_from_a_checkpoint_without_a_trainer(tmp_path: Path) -> None:
    ema = GeneratorEMA(0.5, start=0)
    gan = trained(tmp_path / "x.ckpt", ema)
    fresh = spectral_gan().generator
    before = tensors(fresh)
    found = GeneratorEMA.generator_from_checkpoint(tmp_path / "x.ckpt", fresh)
    same(before, tensors(fresh))
    assert not any(m.training for m in found.modules())
    z = torch.randn(7, 3)
    assert torch.equal(found(z), ema.averaged()(z))
    assert not torch.allclose(found(z), gan.generator.eval()(z))
    # The last layer's largest singular value is 1, for the averaged weights too.
    assert torch.linalg.matrix_norm(found[3].weight, 2).item() == pytest.approx(1.0, abs=1e-3)  # type: ignore[index]
    ema.export(tmp_path / "out" / "generator.pt")
    plain = torch.load(tmp_path / "out" / "generator.pt", weights_only=True)
    fresh.load_state_dict(plain)
    assert torch.equal(fresh.eval()(z), found(z))


def test_one_of_several_averages(tmp_path: Path) -> None:
    averages = (
        GeneratorEMA(0.5, start=0),
        GeneratorEMA(0.9, start=0),
        GeneratorEMA(0.9, start=0, module="discriminator"),
    )
    trained(tmp_path / "x.ckpt", *averages)
    z = torch.randn(7, 3)
    for ema in averages[:2]:
        found = GeneratorEMA.generator_from_checkpoint(
            tmp_path / "x.ckpt", spectral_gan().generator, decay=ema.decay
        )
        assert torch.equal(found(z), ema.averaged()(z))
    judge = GeneratorEMA.generator_from_checkpoint(
        tmp_path / "x.ckpt", nn.Linear(2, 1), module="discriminator"
    )
    assert torch.equal(judge.weight, averages[2].averaged().weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one average of .*module='generator'\). Got 2 in .* decay= where"):
        GeneratorEMA.generator_from_checkpoint(tmp_path / "x.ckpt", nn.Linear(2, 1))


def test_what_a_checkpoint_cannot_give(tmp_path: Path) -> None:
    trained(tmp_path / "with.ckpt", GeneratorEMA(0.5))
    trained(tmp_path / "without.ckpt")
    with pytest.raises(ValueError, match=r"Got 0 in .*without.ckpt, whose averages are: none"):
        GeneratorEMA.generator_from_checkpoint(tmp_path / "without.ckpt", nn.Linear(2, 1))
    with pytest.raises(ValueError, match="not built by the command line; pass the generator"):
        GeneratorEMA.generator_from_checkpoint(tmp_path / "with.ckpt")
    with pytest.raises(ValueError, match=r"built as in training. Got a Linear that the average"):
        GeneratorEMA.generator_from_checkpoint(tmp_path / "with.ckpt", nn.Linear(2, 1))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_predict_gives_samples_of_the_average(tmp_path: Path) -> None:
    trained(tmp_path / "x.ckpt", GeneratorEMA(0.5, start=0))
    found = GeneratorEMA.generator_from_checkpoint(tmp_path / "x.ckpt", spectral_gan().generator)

    def predicted(*callbacks: Callback, **options: Any) -> Tensor:
        parts = trainer(callbacks=callbacks).predict(
            spectral_gan(), ckpt_path=tmp_path / "x.ckpt", weights_only=True, **options
        )
        return torch.cat(parts)  # type: ignore[arg-type]

    class Latents(Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_predict_start(self, _: Trainer, pl_module: Any) -> None:
            draw = pl_module.sample_latents
            pl_module.sample_latents = lambda n: self.seen.append(draw(n)) or self.seen[-1]

    latents = Latents()
    samples = predicted(GeneratorEMA(0.5, start=0), latents)
    assert samples.shape == (100, 2)
    torch.testing.assert_close(samples, found(torch.cat(latents.seen)), rtol=1e-5, atol=1e-6)
    assert torch.equal(samples, predicted(GeneratorEMA(0.5, start=0)))
    assert not torch.allclose(samples, predicted())
    # As many as there are examples.
    loader = torch.utils.data.DataLoader(range(30), batch_size=20)  # type: ignore[arg-type]
    assert predicted(GeneratorEMA(0.5, start=0), dataloaders=loader).shape == (30, 2)
