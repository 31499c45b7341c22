"""Language model: predicts the next token of rows of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_nested.arguments import at_least, check, fraction
from lightning_nested.hyperparameters import DropConnect, DropoutRates, Scalar
from lightning_nested.modules.optimizers import with_scheduler
from lightning_nested.networks.language import LanguageOutput, State, language_network
from lightning_nested.trainer.lightning import built_by_command_line


class TokenPerplexity(MeanMetric):
    """exp of the mean loss over all tokens, those of all batches and processes."""

    def compute(self) -> Tensor:
        """Return the perplexity."""
        return super().compute().exp()


class LanguageModel(LightningModule):
    """Next-token prediction by an LSTM or a small GPT, in automatic optimization, to be used or extended.

    The training loss is the mean cross-entropy of the tokens, and α·mean(h̃²) + β·mean((h_t − h_{t−1})²) for the last
    hidden layer h and its dropped version h̃ (Merity, McCann & Socher 2017, arXiv 1708.01009). Validation and test log
    the mean loss of a token and the perplexity, exp of it: ``val_loss``, ``val_perplexity``.

    All that regularizes can be tuned by a hypergradient callback, each through the attribute of its name, which is None
    otherwise: ``dropout`` (:class:`DropoutRates` with a ``temperature``: each dropout layer of the network),
    ``drop_connect`` (:class:`DropConnect` with a ``temperature``: one p, or one per weight), ``alpha`` and ``beta``
    (:class:`Scalar` of these names). ``group_weights`` (:class:`GroupWeights`) weights rows by their source.

    A batch is ``(inputs, targets)`` or ``(inputs, targets, source)``, of shapes (batch, length) and (batch,), as
    :class:`PydocTextDataModule`, :class:`PennTreebankDataModule` and :class:`TextSourcesDataModule` make them.

    Args:
        network: ``"lstm"``, ``"gpt"``, or any module from (tokens, state) to a :class:`LanguageOutput`.
        vocabulary_size: Number of tokens, at least that of the data; a network given as a module ignores it.
        network_options: Further arguments of a network given by name, such as ``{"output_dropout": 0.5}``; see
            :class:`LSTMNetwork` and :class:`GPT`.
        weight_dropout: Rate at which recurrent weights of the LSTM are zero, one mask a batch, while ``drop_connect``
            is not tuned.
        alpha: α, while it is not tuned.
        beta: β, while it is not tuned.
        carry_state: Rows of a batch go on where those of the batch before ended, as :class:`PennTreebankDataModule`
            makes them: the recurrent state is carried over, without its graph, to the end of an epoch.
        optimizer: From parameters to optimizer.
        scheduler: From optimizer to learning-rate scheduler, stepped after each epoch.

    Raises:
        ValueError: For an unknown network (with close matches) or options that do not fit it, and ``weight_dropout``
            without recurrent weights.
        MisconfigurationException: In ``setup``: the data have more tokens than the model; ``carry_state`` with more
            than one process.

    Example:
        >>> model = LanguageModel("lstm", vocabulary_size=50, network_options={"width": 8})
        >>> tuple(model(torch.zeros(3, 5, dtype=torch.long)).shape)
        (3, 5, 50)
    """

    # Plain attributes, not submodules: what is bound here belongs to the callback, which tunes and saves it.
    dropout: DropoutRates | None = None
    drop_connect: DropConnect | None = None
    alpha: Scalar | None = None
    beta: Scalar | None = None
    group_weights: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        network: str | nn.Module = "lstm",
        *,
        vocabulary_size: int = 2000,
        network_options: dict[str, Any] | None = None,
        weight_dropout: float = 0.0,
        alpha: float = 0.0,
        beta: float = 0.0,
        carry_state: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=4e-3),
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        check(LanguageModel.__init__, locals())
        super().__init__()
        at_least(1, vocabulary_size=vocabulary_size)
        at_least(0, alpha=alpha, beta=beta)
        fraction(weight_dropout=weight_dropout)
        live = {"network": network, "optimizer": optimizer, "scheduler": scheduler}
        plain = built_by_command_line()
        self.save_hyperparameters(ignore=[n for n, value in live.items() if callable(value) and not plain])
        self.network = language_network(network, vocabulary_size, network_options)
        self.vocabulary_size = vocabulary_size
        self.carry_state, self.optimizer, self.scheduler = carry_state, optimizer, scheduler
        self._penalties = {"alpha": alpha, "beta": beta}
        self._weight_dropout = (
            DropConnect(weight_dropout, (1 + weight_dropout) / 2, "*weight_hh*") if weight_dropout else None
        )
        if weight_dropout and not any("weight_hh" in name for name, _ in self.network.named_parameters()):
            raise ValueError(
                f"weight_dropout needs recurrent weights (*weight_hh*). Got {weight_dropout} and a "
                f"{type(self.network).__name__} without any; leave it out."
            )
        self.val_perplexity, self.test_perplexity = TokenPerplexity(), TokenPerplexity()
        self._state: State | None = None  # of the training rows
        self._end: State | None = None  # of this training step
        self._evaluated: State | None = None  # of the rows of an evaluation

    @override
    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        size = getattr(data, "vocabulary_size", None)
        own = getattr(self.network, "vocabulary_size", None)
        if isinstance(size, int) and isinstance(own, int) and size > own:
            raise MisconfigurationException(
                f"vocabulary_size of the model must be at least that of the data, {size}. Got {own}; set the same for "
                "both."
            )
        if self.carry_state and self.trainer.world_size > 1:
            # A distributed sampler deals the rows of a batch to the processes in another order.
            raise MisconfigurationException(
                "carry_state needs rows that go on where those of the batch before ended, so one process. Got "
                f"world_size={self.trainer.world_size}; use Trainer(devices=1), or carry_state=False."
            )

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the next token at each position, (batch, length, vocabulary)."""
        return self._run(tokens, None).logits

    def _run(self, tokens: Tensor, state: State | None) -> LanguageOutput:
        """Run the network on rows that begin with ``state``; in training with weights dropped."""
        drop = self.drop_connect if self.drop_connect is not None else self._weight_dropout
        if drop is None or not self.training:
            return cast("LanguageOutput", self.network(tokens, state))
        weights = drop(dict(self.network.named_parameters()))
        return cast("LanguageOutput", functional_call(self.network, weights, (tokens, state)))

    # ---- losses

    def outer_loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Return the loss that hyperparameters descend: the mean cross-entropy of the tokens."""
        return token_losses(self(batch[0]), batch[1]).mean()

    def training_losses(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the terms of the training loss by name, each a scalar with its graph."""
        tokens, targets, *source = batch
        out = self._run(tokens, _fitting(self._state, tokens))
        self._end = _detached(out.state)
        losses = token_losses(out.logits, targets)
        if self.group_weights is not None:
            if not source:
                raise ValueError(
                    "`group_weights` needs training batches (inputs, targets, source). "
                    f"Got {len(batch)} tensors; TextSourcesDataModule makes them."
                )
            losses = losses * self.group_weights(source[0]).unsqueeze(-1)
        terms = {"cross_entropy": losses.mean()}
        if (alpha := self._penalty("alpha")) is not None:
            terms["alpha"] = alpha * out.dropped.square().mean()
        if (beta := self._penalty("beta")) is not None:
            terms["beta"] = beta * out.features.diff(dim=1).square().mean()
        return terms

    def _penalty(self, name: str) -> Tensor | float | None:
        tuned: Scalar | None = getattr(self, name)
        return tuned.value() if tuned is not None else self._penalties[name] or None

    @override
    def training_step(self, batch: Sequence[Tensor], batch_idx: int = 0) -> Tensor:
        losses = self.training_losses(batch)
        loss = torch.stack(list(losses.values())).sum() if len(losses) > 1 else losses["cross_entropy"]
        # One `self.log` costs as much as a step of a small network: log only what reaches the logger.
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and (self.trainer.global_step + 1) % every == 0:
            found = losses["cross_entropy"].detach()
            self.log_dict({"train_loss": found, "train_perplexity": found.exp()}, prog_bar=True)
        return loss

    @override
    def on_train_epoch_start(self) -> None:
        self._state = None

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Not in training_step, which a callback may call twice for one batch.
        self._state = self._end if self.carry_state else None

    # ---- evaluation

    @override
    def on_validation_epoch_start(self) -> None:
        self._evaluated = None

    @override
    def on_test_epoch_start(self) -> None:
        self._evaluated = None

    @override
    def validation_step(self, batch: Sequence[Tensor], batch_idx: int = 0) -> Tensor:
        """Log ``val_loss`` and ``val_perplexity``."""
        return self._evaluate(batch, "val", self.val_perplexity)

    @override
    def test_step(self, batch: Sequence[Tensor], batch_idx: int = 0) -> Tensor:
        """Log ``test_loss`` and ``test_perplexity``."""
        return self._evaluate(batch, "test", self.test_perplexity)

    def _evaluate(self, batch: Sequence[Tensor], stage: str, perplexity: TokenPerplexity) -> Tensor:
        out = self._run(batch[0], _fitting(self._evaluated, batch[0]))
        self._evaluated = _detached(out.state) if self.carry_state else None
        losses = token_losses(out.logits, batch[1])
        perplexity.update(losses)
        self.log(f"{stage}_loss", losses.mean(), batch_size=losses.numel(), sync_dist=True)
        self.log(f"{stage}_perplexity", perplexity, prog_bar=True)
        return losses.mean()

    @override
    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Return probabilities of the next token at each position; a batch may be bare tokens."""
        logits: Tensor = self(batch if isinstance(batch, Tensor) else batch[0])
        return logits.softmax(-1)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        return with_scheduler(self, self.optimizer, self.scheduler)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each token, (batch, length)."""
    return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def _fitting(state: State | None, tokens: Tensor) -> State | None:
    """Return the state, or None where it is that of another number of rows."""
    return state if state is not None and state[0][0].shape[1] == len(tokens) else None


def _detached(state: State | None) -> State | None:
    return None if state is None else tuple((h.detach(), c.detach()) for h, c in state)
