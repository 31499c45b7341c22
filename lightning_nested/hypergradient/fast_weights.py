"""Training steps with a graph: weights and optimizer state as functions of the hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_nested.linalg.graph import explain_double_backward, refuse_once_differentiable

_DIFFERENTIABLE = (SGD, Adam, AdamW)


class FastWeights:
    """The inner parameters over a few training steps, with the graph of all that moved them.

    The user's optimizer makes each step on the real parameters. Here the same update is repeated by an
    optimizer of the same class with ``differentiable=True``, on tensors that keep their graph, and the values
    are then overwritten by the real ones: what is differentiated is exactly the trajectory that the training
    takes.

    Args:
        module: Its parameters are replaced while a loss is evaluated.
        optimizer: The real one: SGD, Adam or AdamW, with its state so far.
        parameters: Inner parameters by their names in ``module``.

    Raises:
        TypeError: The optimizer is another one.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        if type(optimizer) not in _DIFFERENTIABLE:
            raise TypeError(
                "Unrolled needs an inner optimizer whose step can be differentiated: "
                f"{', '.join(t.__name__ for t in _DIFFERENTIABLE)}. Got {type(optimizer).__name__}; "
                "use one of these, or Implicit(), which works with every optimizer."
            )
        self._optimizer, self._parameters = optimizer, dict(parameters)
        self._names = {id(p): name for name, p in parameters.items()}
        self._caller = _Caller(module)
        self.steps = 0
        # Never changed in place: what a forward pass saves of them stays valid.
        self.values = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
        self._state = {name: _copy(optimizer.state.get(p, {})) for name, p in parameters.items()}

    def evaluate(self, loss: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """Evaluate ``loss(batch)`` with the module's parameters replaced by these."""
        named = {f"module.{name}": value for name, value in self.values.items()}
        result: Tensor = torch.func.functional_call(self._caller, named, (loss, batch))
        return result

    def gradient(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of a loss from :meth:`evaluate`, with their graph; None where it does not depend."""
        values = tuple(self.values.values())
        with explain_double_backward():
            # With a gradient of one that requires gradients, each operation leaves its mark in the graph.
            one = torch.ones_like(loss, requires_grad=True)
            gradients = torch.autograd.grad(loss, values, one, create_graph=True, allow_unused=True)
            if self.steps == 0:  # later graphs hold the same operations, and all earlier steps
                refuse_once_differentiable(gradients)
        return gradients

    def step(self, gradients: Sequence[Tensor | None], rates: Sequence[Tensor] | None = None) -> None:
        """Repeat the optimizer's update with its graph; to be called before the real step.

        Args:
            gradients: One for each parameter, in their order, as the real step gets them; None: not moved.
            rates: Learning rate of each group with its graph; None: the groups' own.
        """
        by_name = dict(zip(self.values, gradients, strict=True))
        groups, state = [], {}
        new = dict(self.values)
        for index, group in enumerate(self._optimizer.param_groups):
            options = {key: value for key, value in group.items() if key != "params"}
            options |= {"differentiable": True, "foreach": False, "fused": False, "capturable": False}
            # Adam divides by the rate here: 0 (a warm-up's first step) must give no move, and no NaN.
            options["lr"] = rates[index] if rates is not None else (float(group["lr"]) or 1e-20)
            moved = []
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                gradient = by_name[name] if name is not None else None
                if name is None or gradient is None:
                    continue
                old = self.values[name]
                tensor = old.clone()
                tensor.grad = gradient
                if isinstance(self._optimizer, SGD):
                    state[tensor] = _sgd_state(self._state[name], group, gradient, old)
                else:
                    state[tensor] = _adam_state(self._state[name], group, old)
                new[name] = tensor
                moved.append((name, tensor))
            if moved:
                groups.append({**options, "params": [tensor for _, tensor in moved]})
        if groups:
            kind: Any = type(self._optimizer)
            twin = kind(groups, lr=1.0, differentiable=True)
            twin.state.update(state)
            twin.step()
            for name, tensor in new.items():
                if tensor in state:
                    tensor.grad = None
                    self._state[name] = twin.state[tensor]
        self.values = new
        self.steps += 1

    def follow(self) -> None:
        """Take the values of the real parameters; to be called after the real step. The graph stays."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                # Through .data: no operation for autograd, which has saved none of these tensors yet.
                self.values[name].data.copy_(parameter)


class _Caller(nn.Module):
    """Wrapper by which ``functional_call`` runs any method of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[Any], Tensor], batch: Any) -> Tensor:
        return function(batch)


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the optimizer state of one parameter, as a start without a graph."""
    copied = {key: v.detach().clone() if isinstance(v, Tensor) else v for key, v in state.items()}
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        if key in copied:
            copied[key] += _floor(copied[key])
    return copied


def _floor(moment: Tensor) -> float:
    """Number added to Adam's second moment: √v has no derivative at 0, where a weight has had no gradient yet.

    Its root is far below the rounding error of any ε in use.
    """
    return float(torch.finfo(moment.dtype).tiny) * 1e8


def _clone(state: Mapping[str, Any]) -> dict[str, Any]:
    # The optimizer changes its state in place, and the graph of the last step holds it.
    return {key: v.clone() if isinstance(v, Tensor) else v for key, v in state.items()}


def _sgd_state(
    state: Mapping[str, Any], group: Mapping[str, Any], gradient: Tensor, value: Tensor
) -> dict[str, Any]:
    """Begin the momentum so that the graph stays; SGD itself begins with the detached gradient."""
    state = _clone(state)
    if group["momentum"] != 0 and state.get("momentum_buffer") is None:
        direction = -gradient if group["maximize"] else gradient
        if group["weight_decay"] != 0:
            direction = direction + group["weight_decay"] * value
        # momentum · buffer + (1 − dampening) · direction must give direction.
        state["momentum_buffer"] = direction * (group["dampening"] / group["momentum"])
    return state


def _adam_state(state: Mapping[str, Any], group: Mapping[str, Any], value: Tensor) -> dict[str, Any]:
    state = _clone(state)
    if not state:
        zeros = torch.zeros_like(value, requires_grad=False)
        state = {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros + _floor(zeros)}
        if group["amsgrad"]:
            state["max_exp_avg_sq"] = zeros + _floor(zeros)
    # torch counts in float32, which would round the bias corrections.
    state["step"] = torch.as_tensor(state["step"], dtype=torch.float64)
    return state
