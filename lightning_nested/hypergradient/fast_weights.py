"""Training steps with a graph: weights and optimizer state as functions of the hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nested.linalg.graph import explain_double_backward, refuse_wrong_derivatives
from lightning_nested.optim.registry import KNOWN


class FastWeights:
    """The inner parameters over a few training steps, with the graph of all that moved them.

    The user's optimizer makes each step on the real parameters. Here the optimizer's rule
    (``lightning_nested.optim.registry``) repeats it on tensors that keep their graph, and the values are then
    overwritten by the real ones: what is differentiated is exactly the trajectory that the training takes.

    Args:
        module: Its parameters are replaced while a loss is evaluated.
        optimizer: The real optimizer with its current state: SGD, Adam, AdamW, or one of this package except
            ``Extragradient``.
        parameters: Inner parameters by their names in ``module``.

    Raises:
        TypeError: The rule of the optimizer is not known, or it takes two gradients.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        usable = [k for k, known in KNOWN.items() if known.rule is not None and known.rule.num_gradients == 1]
        if type(optimizer) not in usable:
            raise TypeError(
                "Unrolled needs an inner optimizer whose step can be differentiated: "
                f"{', '.join(t.__name__ for t in usable)}. Got {type(optimizer).__name__}; "
                "use one of these, or Implicit(), which works with every optimizer."
            )
        self._optimizer, self._parameters = optimizer, dict(parameters)
        self._names = {id(p): name for name, p in parameters.items()}
        self._caller = _Caller(module)
        self.steps = 0
        # Never changed in place: what a forward pass saves of them stays valid.
        self.values = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
        self._state: dict[str, dict[str, Any]] = {
            name: {
                k: v.detach().clone() for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor)
            }
            for name, p in parameters.items()
        }

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
                refuse_wrong_derivatives((loss, *gradients))
        return tuple(map(_hooked, self._parameters.values(), gradients))

    def step(
        self,
        gradients: Sequence[Tensor | None],
        rates: Sequence[Tensor] | None = None,
        decays: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        """Repeat the optimizer's update with its graph; call it before the real step.

        Args:
            gradients: One for each parameter, in their order, as the real step gets them; None: not moved.
            rates: Learning rate of each group with its graph; None: the groups' own.
            decays: Decoupled decays d by name, with their graph: each makes w ← (1 − rate·d)w before the update.
        """
        by_name = dict(zip(self.values, gradients, strict=True))
        for index, group in enumerate(self._optimizer.param_groups):
            rule: Any = KNOWN[type(self._optimizer)].rule_of(group)
            if rates is not None:
                rule = replace(rule, lr=rates[index])
            for name in (self._names.get(id(p)) for p in group["params"]):
                gradient = by_name[name] if name is not None else None
                if name is None or gradient is None:
                    continue
                value, state = self.values[name], self._state[name]
                for decay in (found[name] for found in decays if name in found):
                    value = value * (1 - rule.lr * decay).to(value.dtype)
                buffers, taken = rule.resume(value, state)
                # torch counts in float32, which would round the bias corrections
                count = torch.tensor(taken + 1, dtype=torch.float64)
                self.values[name], buffers = rule.step(value, gradient, buffers, count)
                state.update(zip(rule.slots, buffers, strict=False), step=count)
        self.steps += 1

    def follow(self) -> None:
        """Copy the values of the real parameters and keep the graph; call it after the real step."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                # Through .data: no operation for autograd, which has saved none of these tensors yet.
                self.values[name].data.copy_(parameter)


def _hooked(parameter: nn.Parameter, gradient: Tensor | None) -> Tensor | None:
    """Return what the hooks of ``Tensor.register_hook`` on the real parameter make of its gradient."""
    for hook in (parameter._backward_hooks or {}).values():
        changed = None if gradient is None else hook(gradient)
        gradient = gradient if changed is None else changed
    return gradient


class _Caller(nn.Module):
    """Wrapper by which ``functional_call`` runs any method of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[Any], Tensor], batch: Any) -> Tensor:
        return function(batch)
