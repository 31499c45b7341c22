"""An LSTM whose gates answer to hyperparameters."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.hypernetworks.layers import HyperLayer, add_bias, check_examples, placement, respond_to

State = tuple[Tensor, Tensor]


class HyperLSTM(HyperLayer, nn.LSTM):
    """``nn.LSTM`` with W(h) = W₀ + diag(V h) W₁ in each of its matrices, four rows per unit.

    With one h the fast kernel runs on the weights at h. With one h of each example the recurrence is written out,
    one step at a time: several times slower.

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
        nn.LSTM.__init__(self, input_size, hidden_size, **options)
        self.respond(num_hyperparameters)

    def forward(  # type: ignore[override]
        self, x: Any, state: State | None = None, h: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Outputs and last state, as ``nn.LSTM``."""

        def per_example(x: Tensor, delta: Tensor, linearized: bool) -> tuple[Tensor, State]:
            return self._per_example(x, state, delta, linearized)

        return cast("tuple[Tensor, State]", self._call(per_example, x, h, state))

    def _per_example(
        self, x: Tensor, state: State | None, delta: Tensor, linearized: bool
    ) -> tuple[Tensor, State]:
        if not isinstance(x, Tensor) or x.dim() != 3 or self.proj_size:
            raise ValueError(
                "HyperLSTM with one h of each example needs a padded batch and proj_size=0. "
                f"Got {type(x).__name__}, proj_size={self.proj_size}; give one h of shape (n,)."
            )
        check_examples(x, delta, 0 if self.batch_first else 1, type(self).__name__)
        x = x.transpose(0, 1) if self.batch_first else x
        directions = 2 if self.bidirectional else 1
        if state is None:
            zeros = x.new_zeros(self.num_layers * directions, x.shape[1], self.hidden_size)
            state = (zeros, zeros)
        last: list[State] = []
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
        self, x: Tensor, state: State, suffix: str, delta: Tensor, linearized: bool
    ) -> tuple[Tensor, State]:
        """One layer in one direction; x (time, batch, width)."""

        def gates(v: Tensor, kind: str) -> Tensor:
            y = respond_to(
                functional.linear, v, getattr(self, f"weight_{kind}{suffix}"),
                self.response_of(f"weight_{kind}{suffix}"), delta, placement(v.dim(), -2, -1), linearized,
            )  # fmt: skip
            bias = getattr(self, f"bias_{kind}{suffix}") if self.bias else None
            response = self.response_of(f"bias_{kind}{suffix}")
            return add_bias(y, bias, response, delta, placement(v.dim(), -2, -1), linearized)

        hidden, cell = state
        outputs = []
        for of_input in gates(x, "ih").unbind(0):
            i, f, g, o = (of_input + gates(hidden, "hh")).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            outputs.append(hidden)
        return torch.stack(outputs), (hidden, cell)
