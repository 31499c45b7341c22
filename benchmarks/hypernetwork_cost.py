"""What a converted network costs: forward and backward against the plain network's.

ResNet-18 of torchvision, an LSTM language model and a small transformer, converted without edits, for ten
hyperparameters. "One point": w(h) for the batch. "One of each example": the layers' own rule, where they have one.
"Delta-STN": the loss at the center for the general weights, and the linearised loss for the response; its default takes
"both losses" in every third step, and "mean" is what its steps cost on average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import torch
import torchvision
from _measuring import Spread, interleave, live_memory, load, parser, print_table, report, start
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.hypernetworks import Response, best_response
from lightning_nested.hypernetworks.response import Mode
from lightning_nested.modules import DeltaSTN

N, VOCABULARY = 10, 2000
EVERY = DeltaSTN().response_every
MEAN = f"mean of {EVERY} steps"


class LanguageModel(nn.Module):
    """Two LSTM layers with tied embeddings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)
        self.output = nn.Linear(width, VOCABULARY)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each position."""
        return self.output(self.lstm(self.embedding(tokens))[0])


class Transformer(nn.Module):
    """Two encoder layers over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each position."""
        return self.output(self.encoder(self.embedding(tokens)))


class Step:
    """A training loss, as the loop of a module calls it."""

    def __init__(self, response: Response, loss: Callable[[Tensor], Tensor]) -> None:
        self.response, self.inner_steps, self._loss = response, 0, loss

    def __call__(self, batch: Any, h: Tensor, mode: Mode = "response", *, repeated: bool = False) -> Tensor:
        """At h; the networks here have no running statistics worth holding."""
        with self.response.at(h, mode):
            return self._loss(self.response(batch))


def contestants(response: Response, plain: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    """Forward and backward of each form."""
    one, each = 0.1 * torch.randn(N), 0.1 * torch.randn(len(x), N)
    general, phi = list(response.general_parameters().values()), list(response.response_parameters().values())
    every = [*general, *phi]

    def loss(output: Tensor) -> Tensor:
        return functional.cross_entropy(output.flatten(0, -2), y.flatten())

    def unit() -> None:
        torch.autograd.grad(loss(plain(x)), list(plain.parameters()))

    def at(h: Tensor) -> None:
        torch.autograd.grad(loss(response(x, h)), every, allow_unused=True)

    def delta(h: Tensor, steps: int) -> None:
        step = Step(response, loss)
        for step.inner_steps in range(steps):
            DeltaSTN().gradients(step, x, response.center, h, general, phi)

    calls: dict[str, Callable[[], Any]] = {"plain": unit, "one point": lambda: at(one)}
    points = {"one point": one}
    if not response.one_point_only():
        calls["one of each example"] = lambda: at(each)
        points["one of each example"] = each
    for name, h in points.items():
        calls[f"Delta-STN, {name}, both losses"] = lambda h=h: delta(h, 1)  # type: ignore[misc]
        calls[f"Delta-STN, {name}, {MEAN}"] = lambda h=h: delta(h, EVERY)  # type: ignore[misc]
    return calls


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, rounds=9)
    options.add_argument("--batch", type=int, default=16, help="examples (default: %(default)s)")
    options.add_argument(
        "--width",
        type=int,
        default=128,
        help="of the language model and the transformer (default: %(default)s)",
    )
    arguments = options.parse_args(argv)
    start(arguments)
    before = load()
    torch.manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (arguments.batch, 21))
    text = (tokens[:, :-1], tokens[:, 1:])
    images = (torch.randn(arguments.batch, 3, 32, 32), torch.randint(0, 10, (arguments.batch,)))
    cases: dict[str, tuple[nn.Module, tuple[Tensor, Tensor]]] = {
        "ResNet-18": (torchvision.models.resnet18(num_classes=10), images),
        "LSTM language model": (LanguageModel(arguments.width), text),
        "transformer": (Transformer(arguments.width), text),
    }
    rows, results = [], {}
    for name, (plain, (x, y)) in cases.items():
        response = best_response(plain, N)
        calls = contestants(response, plain, x, y)
        unit = calls.pop("plain")
        times = interleave(
            calls, {"U": unit}, rounds=arguments.rounds, threads=arguments.threads,
            contestant_repeats=3,  # the second call in a row finds pages and caches as the unit's did
        )  # fmt: skip
        base = live_memory(unit)
        for form, call in calls.items():
            memory, of = live_memory(call) / base, times[form]
            steps = EVERY if MEAN in form else 1
            units = Spread(*(value / steps for value in astuple(of.units["U"])))
            milliseconds = 1e3 * of.seconds.median / steps
            rows.append([name, form, units.text(), f"{milliseconds:.0f}", f"{memory:.2f}"])
            results[f"{name}, {form}"] = {"time": of, "steps": steps, "memory": memory}
        results[f"{name}, parameters"] = response.num_parameters()
    print_table(["network", "form", "U per step [quartiles]", "ms", "memory / plain's"], rows)
    report(arguments, results, packages=("torchvision",), load_before=before)
    return results


if __name__ == "__main__":
    main()
