"""LanguageModel: its losses, state, perplexity, and what a callback tunes in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.datamodules import PennTreebankDataModule, PydocTextDataModule, TextSourcesDataModule
from lightning_nested.hyperparameters import DropConnect, DropoutRates, Exp, GroupWeights, Scalar
from lightning_nested.modules import LanguageModel
from lightning_nested.modules.language import token_losses
from tests.trainers import trainer

SMALL: dict[str, Any] = {"vocabulary_size": 30, "network_options": {"width": 6}}
SIZES: dict[str, Any] = {"length": 6, "vocabulary_size": 30, "batch_size": 4}


def model(**options: Any) -> LanguageModel:
    seed_everything(0, verbose=False)
    return LanguageModel(**{**SMALL, **options})


def batch(rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(30, (rows, 8), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:], torch.arange(rows) % 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small text in the format of Mikolov's Penn Treebank."""
    for split, lines in (("train", 40), ("valid", 12), ("test", 12)):
        text = "".join(
            " " + " ".join(f"w{(k * k + i) % 25}" for i in range(9)) + " <unk> N \n" for k in range(lines)
        )
        (tmp_path / f"ptb.{split}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def test_losses_are_cross_entropy_and_penalties_of_the_last_layer() -> None:
    module = model(alpha=2.0, beta=3.0, network_options={"width": 6, "output_dropout": 0.5}).double()
    torch.manual_seed(3)
    terms = module.training_losses(batch())
    torch.manual_seed(3)
    out = module.network(batch()[0])
    steps = out.features[:, 1:] - out.features[:, :-1]
    torch.testing.assert_close(terms["alpha"], 2.0 * out.dropped.square().mean())
    torch.testing.assert_close(terms["beta"], 3.0 * steps.square().mean())
    torch.testing.assert_close(terms["cross_entropy"], token_losses(out.logits, batch()[1]).mean())
    assert set(model().training_losses(batch())) == {"cross_entropy"}


def test_group_weights_weight_rows_by_their_source() -> None:
    module = model()
    module.group_weights = lambda source: torch.where(source == 0, 3.0, 0.0)
    losses = token_losses(module(batch()[0]), batch()[1])
    expected = 3.0 * (losses[0] + losses[2]).sum() / losses.numel()
    torch.testing.assert_close(module.training_losses(batch())["cross_entropy"], expected)
    torch.testing.assert_close(module.outer_loss(batch()), losses.mean())
    with pytest.raises(ValueError, match=r"\(inputs, targets, source\). Got 2 tensors"):
        module.training_losses(batch()[:2])


def test_recurrent_weights_are_dropped_in_training_alone() -> None:
    module, inputs = model(weight_dropout=0.5), batch()[0]
    assert not torch.equal(module(inputs), module(inputs))
    module.eval()
    assert torch.equal(module(inputs), module.network(inputs).logits)


def tuned() -> list[Any]:
    """Thirty-odd rates of each kind, relaxed."""
    return [
        DropoutRates(init=0.3, temperature=0.5),
        DropConnect(0.3, include="*weight_hh*", per="parameter", temperature=0.5),
        Scalar("alpha", 0.5, Exp()),
        Scalar("beta", 0.5, Exp()),
    ]


def test_mixed_derivatives_reach_every_rate_and_penalty() -> None:
    module = model(network_options={"width": 3, "layers": 2}).double()
    parameters = dict(module.named_parameters())
    for hyperparameter in tuned():
        hyperparameter.attach_module(module)
        hyperparameter.build(parameters)
        setattr(module, hyperparameter.name, hyperparameter)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}

    def slope() -> Tensor:
        torch.manual_seed(5)
        loss = torch.stack(list(module.training_losses(batch()).values())).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        return sum((g * d).sum() for g, d in zip(found, direction.values(), strict=True))

    leaves = [
        leaf
        for name in ("dropout", "drop_connect", "alpha", "beta")
        for leaf in getattr(module, name).tensors.values()
    ]
    assert sorted(leaf.numel() for leaf in leaves) == [1, 1, 4, 36, 36]
    found = torch.autograd.grad(slope(), leaves)
    for leaf, derivative in zip(leaves, found, strict=True):
        step, values = 1e-5, []
        for by in (step, -2 * step, step):
            leaf.data.view(-1)[-1] += by
            values.append(float(slope().detach()))
        expected = (values[0] - values[1]) / (2 * step)
        assert float(derivative.view(-1)[-1]) == pytest.approx(expected, rel=1e-5, abs=1e-9)
        assert float(derivative.abs().max()) > 0


@pytest.mark.parametrize("source", ["pydoc", "ptb", "sources"])
def test_rates_are_tuned_on_each_text_and_stay_in_the_layers(source: str, folder: Path) -> None:
    data: Any = {
        "pydoc": lambda: PydocTextDataModule(train_tokens=400, **SIZES),
        "ptb": lambda: PennTreebankDataModule(str(folder), **SIZES),
        "sources": lambda: TextSourcesDataModule(
            ["pydoc", "docstrings"], train_tokens=400, max_characters=20_000, **SIZES
        ),
    }[source]()
    module, callback = model(carry_state=source == "ptb"), HypergradientCallback(tuned(), every_n_steps=4)
    start = {name: p.clone() for name, p in module.named_parameters()}
    fit = trainer(callback, max_epochs=-1, max_steps=20, limit_val_batches=3)
    fit.fit(module, datamodule=data)
    assert callback.outer_loop.outer_steps >= 3
    assert callback.outer_loop.skipped_steps == 0
    assert all(not torch.equal(p, start[name]) for name, p in module.named_parameters())
    rates = callback.values()["dropout"]
    assert bool((rates != 0.3).all())
    assert type(module.network.dropouts["input"]).__name__ == "SequenceDropout"
    assert [layer.p for layer in module.network.dropouts.values()] == pytest.approx(rates.tolist())
    assert module.dropout is module.drop_connect is module.alpha is None
    found = fit.validate(module, datamodule=data, verbose=False)[0]
    assert found["val_perplexity"] == pytest.approx(torch.tensor(found["val_loss"]).exp().item(), rel=1e-4)


def test_groups_are_tuned_in_a_small_gpt() -> None:
    weights = GroupWeights(["docstrings", "pydoc"])
    data = TextSourcesDataModule(
        ["docstrings", "pydoc"], mixture="tuned", train_tokens=400, max_characters=20_000, **SIZES
    )
    module = model(network="gpt", network_options={"width": 6, "depth": 1, "dropout": 0.1})
    callback = HypergradientCallback(weights, every_n_steps=3, train_batches=1)
    trainer(callback, max_epochs=-1, max_steps=15, limit_val_batches=3).fit(module, datamodule=data)
    assert callback.outer_loop.outer_steps >= 3
    assert float(weights.values()["pydoc"]) != 0.5


def test_the_state_goes_on_from_batch_to_batch_of_an_epoch(folder: Path) -> None:
    data, seen = PennTreebankDataModule(str(folder), **SIZES), []
    module = model(carry_state=True)
    original = module.network.forward

    def forward(tokens: Tensor, state: Any = None) -> Any:
        out = original(tokens, state)
        seen.append((None if state is None else state[0][0].clone(), out.state[0][0].detach().clone()))
        return out

    module.network.forward = forward  # type: ignore[method-assign]
    trainer(max_epochs=2, limit_train_batches=3, limit_val_batches=0).fit(module, datamodule=data)
    assert [state is None for state, _ in seen] == [True, False, False] * 2
    assert torch.equal(seen[1][0], seen[0][1])
    # A second evaluation of a batch begins where the first one did.
    module._state = None
    module.training_losses(next(iter(data.train_dataloader())))
    assert module._state is None


def test_perplexity_is_of_all_tokens_however_they_are_cut_into_batches() -> None:
    found = []
    for size in (4, 7):
        data = PydocTextDataModule(train_tokens=400, val_batch_size=size, **SIZES)
        data.setup()
        data.test_rows = data.test_rows[:10]
        found.append(trainer().test(model(), datamodule=data, verbose=False)[0])
    expected = model().outer_loss((data.test_rows[:, :-1], data.test_rows[:, 1:]))
    for metrics in found:
        assert metrics["test_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
        assert metrics["test_perplexity"] == pytest.approx(float(expected.detach().exp()), rel=1e-5)


def test_a_scheduler_is_stepped_and_probabilities_are_predicted(tmp_path: Path) -> None:
    from lightning.pytorch.cli import ReduceLROnPlateau

    module = model(
        optimizer=lambda p: torch.optim.SGD(p, lr=30.0),
        scheduler=lambda o: ReduceLROnPlateau(o, "val_loss", threshold=100.0, patience=0, factor=0.25),
    )
    data = PydocTextDataModule(train_tokens=100, **SIZES)
    fit = trainer(max_epochs=3, gradient_clip_val=0.25, limit_val_batches=3, folder=tmp_path)
    fit.fit(module, datamodule=data)
    assert fit.optimizers[0].param_groups[0]["lr"] < 30.0
    torch.testing.assert_close(module.predict_step(batch()).sum(-1), torch.ones(3, 7))


def test_a_smaller_vocabulary_than_that_of_the_data_is_refused() -> None:
    data = PydocTextDataModule(**{**SIZES, "vocabulary_size": 31})
    with pytest.raises(MisconfigurationException, match=r"at least that of the data, 31\. Got 30"):
        trainer().fit(model(), datamodule=data)
    with pytest.raises(ValueError, match=r"alpha must be at least 0"):
        model(alpha=-1.0)
    with pytest.raises(ValueError, match=r"weight_dropout must lie in \[0, 1\)"):
        model(weight_dropout=1.0)


def test_any_module_can_be_the_network() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(30, 30)

        def forward(self, tokens: Tensor, state: Any = None) -> Any:
            from lightning_nested.networks import LanguageOutput

            logits = self.table(tokens)
            return LanguageOutput(logits, logits, logits, None)

    data = PydocTextDataModule(train_tokens=100, **SIZES)
    trainer(limit_val_batches=3).fit(model(network=Counts(), network_options=None), datamodule=data)


def test_recurrent_weights_must_be_there_to_be_dropped() -> None:
    with pytest.raises(ValueError, match=r"needs recurrent weights \(\*weight_hh\*\). Got 0.5 and a GPT"):
        LanguageModel("gpt", vocabulary_size=9, network_options={"width": 8}, weight_dropout=0.5)


def test_states_are_not_carried_over_on_several_processes() -> None:
    """A distributed sampler deals rows in another order, so that a state would be that of other text."""
    module = LanguageModel("lstm", vocabulary_size=9, network_options={"width": 4}, carry_state=True)
    module._trainer = SimpleNamespace(world_size=2, datamodule=None)  # type: ignore[assignment]
    with pytest.raises(
        MisconfigurationException, match=r"carry_state needs .* one process. Got world_size=2"
    ):
        module.setup("fit")
