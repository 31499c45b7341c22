"""Preparations of HypernetworkModule: the response that its hyperparameters need, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_nested.hypernetworks import Response, best_response
from lightning_nested.hyperparameters import (
    DropoutRates,
    Hyperparameter,
    HyperparameterVector,
    ModuleTensors,
    OuterStep,
)
from lightning_nested.hyperparameters.optimizer_options import OptimizerOption
from lightning_nested.modules.hypernetwork.options import ResponseOptions
from lightning_nested.trainer.requirements import refuse_loss_scaling, refuse_strategy


def through_the_loss(hyperparameters: Hyperparameter | Sequence[Hyperparameter]) -> list[Hyperparameter]:
    """List the hyperparameters; refuse those that act neither through the training loss nor through a penalty."""
    tuned = [hyperparameters] if isinstance(hyperparameters, Hyperparameter) else list(hyperparameters)
    for h in tuned:
        if isinstance(h, OptimizerOption | ModuleTensors):
            raise ValueError(
                "A hyperparameter of HypernetworkModule must act through the training loss or the weights' "
                f"penalty. Got {h.name!r}, a {type(h).__name__}; tune it with NestedModule."
            )
    return tuned


def build_response(network: nn.Module, outer: OuterStep) -> tuple[Response, HyperparameterVector]:
    """Convert the network unless it is a response, install dropout rates, build the hyperparameters for it.

    Raises:
        ValueError: A response is of another number of hyperparameters.
    """
    tuned = outer.hyperparameters
    response = network if isinstance(network, Response) else best_response(network, _count(tuned, network))
    parameters = {n: p.detach() for n, p in response.general_parameters().items()}
    for hyperparameter in tuned:
        if isinstance(hyperparameter, DropoutRates):
            hyperparameter.install(response.module, response.layers.batch_dim)
    outer.build(parameters, "cpu")
    vector = HyperparameterVector((*outer.in_graph, *outer.decays))
    if response.num_hyperparameters != len(vector):
        raise ValueError(
            f"The response must have num_hyperparameters={len(vector)}, one per unconstrained number. "
            f"Got a response with {response.num_hyperparameters}."
        )
    return response, vector


def each_example_alone(vector: HyperparameterVector, response: Response, options: ResponseOptions) -> bool:
    """Return True if each example of a batch tries an h of its own.

    Raises:
        ValueError: ``options.per_example=True``, and something acts on the whole batch.
    """
    reasons = [f"{h.name} acts on the whole batch" for h in vector.hyperparameters if not h.per_example]
    if options.refine_steps:
        reasons.append("refine_steps moves the weights of one point")
    if options.per_example and reasons:
        raise ValueError(
            f"per_example=True needs losses and layers that take one λ of each example. Got: {'; '.join(reasons)}. "
            "Leave it out: one λ is then tried for each batch."
        )
    # Possible for every module, but where a layer has no rule of its own it takes a set of weights for each example.
    return not (reasons or response.one_point_only()) if options.per_example is None else options.per_example


def examples_in(batch: Any, dim: int) -> int:
    """Return the length of a batch's first tensor in dimension ``dim``; refuse a batch that has none."""
    for tensor in _tensors(batch):
        if tensor.dim() > dim:
            return tensor.shape[dim]
    raise MisconfigurationException(
        f"num_examples(batch) must know the size of a batch. Got a {type(batch).__name__} without tensors; "
        "override it."
    )


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    nested = isinstance(parts, Sequence) and not isinstance(parts, str)
    return [tensor for part in parts for tensor in _tensors(part)] if nested else []


def epoch_schedulers(
    makers: Sequence[Callable[[Any], Any] | None], optimizers: Sequence[Optimizer]
) -> list[LRScheduler]:
    """Make the schedulers that are given, each for its optimizer; refuse one that waits for a metric."""
    pairs = zip(makers, optimizers, strict=True)
    schedulers = [make(optimizer) for make, optimizer in pairs if make is not None]
    if any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in schedulers):
        raise MisconfigurationException(
            "Schedulers of HypernetworkModule are stepped by the epoch. Got ReduceLROnPlateau, which "
            "needs a metric; use another, or step it in on_validation_epoch_end."
        )
    return schedulers


def refuse_settings(trainer: Trainer) -> None:
    """Refuse strategies that shard parameters, and precisions that scale losses."""
    refuse_strategy(trainer, "HypernetworkModule")
    refuse_loss_scaling(trainer, "HypernetworkModule")


def _count(tuned: Sequence[Hyperparameter], network: nn.Module) -> int:
    """Count the unconstrained numbers that the hyperparameters will have on this network."""
    parameters = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
    count = 0
    for hyperparameter in tuned:
        if isinstance(hyperparameter, DropoutRates):
            count += hyperparameter.count(network)
        else:
            hyperparameter.build(parameters, "cpu")
            count += sum(t.numel() for t in hyperparameter.tensors.values())
    return count
