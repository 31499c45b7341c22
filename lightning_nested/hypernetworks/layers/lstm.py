"""LSTM whose weights respond to hyperparameters."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.arguments import at_least, checked
from lightning_nested.hypernetworks.layers.arithmetic import linear, make_dual, total, unpack_dual
from lightning_nested.hypernetworks.layers.base import HyperLayer, OnePointError, check_examples, placement
from lightning_nested.hypernetworks.layers.recurrence import Hidden, lstm_recurrence


@checked
class HyperLSTM(HyperLayer, nn.LSTM):
    """``nn.LSTM`` with W(h) = W₀ + diag(V h) W₁ in each of its matrices, four rows per unit.

    With one h the fast kernel runs on the weights at h. With one h of each example, and for the linearised output,
    :func:`lstm_recurrence` does.

    Args:
        input_size: Width of x.
        hidden_size: Width of the state.
        num_hyperparameters: n.
        **options: The other arguments of ``nn.LSTM``.

    Raises:
        ValueError: With one h of each example: x is a packed sequence or has no batch, or ``proj_size`` is given.
    """

    plain = nn.LSTM

    def __init__(self, input_size: int, hidden_size: int, num_hyperparameters: int, **options: Any) -> None:
        at_least(1, input_size=input_size, hidden_size=hidden_size, num_hyperparameters=num_hyperparameters)
        nn.LSTM.__init__(self, input_size, hidden_size, **options)
        self.respond(num_hyperparameters)

    def forward(  # type: ignore[override]
        self, x: Any, state: Hidden | None = None, h: Tensor | None = None
    ) -> tuple[Tensor, Hidden]:
        """Return the outputs and the last state, as ``nn.LSTM``."""

        def per_example(x: Tensor, delta: Tensor, linearized: bool) -> tuple[Tensor, Hidden]:
            if not self._written_out(x):
                raise OnePointError(
                    "HyperLSTM with one h of each example needs a padded batch and proj_size=0. "
                    f"Got {type(x).__name__}, proj_size={self.proj_size}; give one h of shape (n,)."
                )
            check_examples(x, delta, 0 if self.batch_first else 1, type(self).__name__)
            return self._layers(x, state, delta, linearized)

        return cast("tuple[Tensor, Hidden]", self._call(per_example, x, h, state))

    def _plain(self, x: Any, *rest: Any) -> Any:
        # The kernels of torch have no forward mode.
        dual = any(unpack_dual(p)[1] is not None for p in self._parameters.values() if p is not None)
        if self._written_out(x) and (dual or unpack_dual(x)[1] is not None):
            (state,) = rest
            return self._layers(x, state, None, False)
        return super()._plain(x, *rest)

    def _written_out(self, x: Any) -> bool:
        """Return True if :meth:`_layers` can evaluate x."""
        return isinstance(x, Tensor) and x.dim() == 3 and not self.proj_size

    def _layers(
        self, x: Tensor, state: Hidden | None, delta: Tensor | None, linearized: bool
    ) -> tuple[Tensor, Hidden]:
        directions = 2 if self.bidirectional else 1
        if state is None:
            examples = x.shape[0 if self.batch_first else 1]
            zeros = x.new_zeros(self.num_layers * directions, examples, self.hidden_size)
            state = (zeros, zeros)
        self.check_forward_args(x, state, None)
        x = x.transpose(0, 1) if self.batch_first else x
        last: list[Hidden] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                suffix = f"_l{layer}{'_reverse' if direction else ''}"
                i = layer * directions + direction
                start = (state[0][i], state[1][i])
                y, end = self._scan(x.flip(0) if direction else x, start, suffix, delta, linearized)
                outputs.append(y.flip(0) if direction else y)
                last.append(end)
            x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = functional.dropout(x, self.dropout)
        x = x.transpose(0, 1) if self.batch_first else x
        return x, (torch.stack([s[0] for s in last]), torch.stack([s[1] for s in last]))

    def _scan(
        self, x: Tensor, start: Hidden, suffix: str, delta: Tensor | None, linearized: bool
    ) -> tuple[Tensor, Hidden]:
        """Run one layer in one direction; x (time, batch, width)."""
        recurrent = getattr(self, f"weight_hh{suffix}")
        biases = [f"bias_{kind}{suffix}" for kind in ("ih", "hh") if self.bias]
        direction = coefficient = None
        if delta is None:
            bias = total(*(getattr(self, name) for name in biases))
            inputs = linear(x, getattr(self, f"weight_ih{suffix}"), bias)
        else:
            place = placement(3, 1, -1)
            inputs = self._responded(linear, x, delta, place, linearized, f"weight_ih{suffix}", biases)
            response = self.response_of(f"weight_hh{suffix}")
            if response is not None:
                direction = response.direction
                coefficient = response.coefficients(delta).expand(x.shape[1], -1)
        if linearized:
            recurrent = recurrent.detach()
            if unpack_dual(inputs)[1] is None:
                inputs = make_dual(inputs, torch.zeros_like(inputs))
        outputs, cell = lstm_recurrence(
            inputs, start, recurrent, direction, coefficient, linearized=linearized
        )
        return outputs, (outputs[-1], cell)
