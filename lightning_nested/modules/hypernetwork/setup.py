"""The response that a list of hyperparameters needs, and whether each example can try a point of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_nested.hypernetworks import Response, best_response
from lightning_nested.hyperparameters import DropoutRates, Hyperparameter, HyperparameterVector, OuterStep
from lightning_nested.modules.hypernetwork.options import ResponseOptions


def build_response(network: nn.Module, outer: OuterStep) -> tuple[Response, HyperparameterVector]:
    """Convert the network unless it is a response, install dropout rates, build the hyperparameters.

    Args:
        network: A module, which is copied, or a response.
        outer: Its hyperparameters are built for the network's parameters.

    Raises:
        ValueError: A response is of another number of hyperparameters.
    """
    tuned = outer.hyperparameters
    if isinstance(network, Response):
        response, given = network, " a response with"
        parameters = {n: p.detach() for n, p in response.general_parameters().items()}
    else:
        parameters = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
        response, given = best_response(network, _count(tuned, parameters, network)), ""
    for hyperparameter in tuned:
        if isinstance(hyperparameter, DropoutRates):
            hyperparameter.install(response.module, response.layers.batch_dim)
    outer.build(parameters, "cpu")
    vector = HyperparameterVector((*outer.in_graph, *outer.decays))
    if response.num_hyperparameters != len(vector):
        raise ValueError(
            f"The response must have num_hyperparameters={len(vector)}, one per unconstrained number. "
            f"Got{given} {response.num_hyperparameters}."
        )
    return response, vector


def one_point_of_each_example(
    vector: HyperparameterVector, response: Response, options: ResponseOptions
) -> bool:
    """Whether each example of a batch tries an h of its own.

    Raises:
        ValueError: ``options.per_example=True``, and something acts on the whole batch.
    """
    reasons = [f"{h.name} acts on the whole batch" for h in vector.hyperparameters if not h.per_example]
    if response.one_point_only():
        reasons.append(f"{response.one_point_only()[0]} has no layer that responds by itself")
    if options.refine_steps:
        reasons.append("refine_steps moves the weights of one point")
    if options.per_example and reasons:
        raise ValueError(
            f"per_example=True needs losses and layers that take one λ of each example. Got: {'; '.join(reasons)}. "
            "Leave it out: one λ is then tried for each batch."
        )
    return not reasons if options.per_example is None else options.per_example


def length_of_first_tensor(batch: Any, dim: int = 0) -> int | None:
    """Of a nested batch, in dimension ``dim``; None where there is no tensor that has it."""
    if isinstance(batch, Tensor):
        return batch.shape[dim] if batch.dim() > dim else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return next((n for b in batch if (n := length_of_first_tensor(b, dim)) is not None), None)
    return None


def _count(tuned: Sequence[Hyperparameter], parameters: Mapping[str, Tensor], network: nn.Module) -> int:
    """Unconstrained numbers that the hyperparameters will have on this network."""
    count = 0
    for hyperparameter in tuned:
        if isinstance(hyperparameter, DropoutRates):
            count += hyperparameter.count(network)
        else:
            hyperparameter.build(parameters, "cpu")
            count += sum(t.numel() for t in hyperparameter.tensors.values())
    return count
