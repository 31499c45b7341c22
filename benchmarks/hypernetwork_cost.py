"""What a converted network costs: forward and backward against the plain network's.

ResNet-18 of torchvision, an LSTM language model and a small transformer, converted without edits, for ten
hyperparameters. "One point": w(h) for the batch. "One of each example": the layers' own rule, where they have one.
"Delta-STN step": the loss at the center for the general weights, and the linearised loss for the response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from _measuring import interleave, live_memory, load, parser, print_table, report, start
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.hypernetworks import Response, best_response

N, VOCABULARY = 10, 2000


class LanguageModel(nn.Module):
    """Two LSTM layers with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 128)
        self.lstm = nn.LSTM(128, 128, 2, batch_first=True)
        self.output = nn.Linear(128, VOCABULARY)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each position."""
        return self.output(self.lstm(self.embedding(tokens))[0])


class Transformer(nn.Module):
    """Two encoder layers over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(128, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each position."""
        return self.output(self.encoder(self.embedding(tokens)))


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

    def delta(h: Tensor) -> None:
        with response.at(h, "general"):
            torch.autograd.grad(loss(response(x)), general)
        with response.at(h, "linearized"):
            torch.autograd.grad(loss(response(x)), phi, allow_unused=True)

    calls: dict[str, Callable[[], Any]] = {"plain": unit, "one point": lambda: at(one)}
    steps = {"one point": one}
    if not response.one_point_only():
        calls["one of each example"] = lambda: at(each)
        steps["one of each example"] = each
    return calls | {f"Delta-STN, both losses, {name}": lambda h=h: delta(h) for name, h in steps.items()}  # type: ignore[misc]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, rounds=9)
    options.add_argument("--batch", type=int, default=16)
    arguments = options.parse_args(argv)
    start(arguments)
    before = load()
    torch.manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (arguments.batch, 21))
    text = (tokens[:, :-1], tokens[:, 1:])
    images = (torch.randn(arguments.batch, 3, 32, 32), torch.randint(0, 10, (arguments.batch,)))
    cases: dict[str, tuple[nn.Module, tuple[Tensor, Tensor]]] = {
        "ResNet-18": (torchvision.models.resnet18(num_classes=10), images),
        "LSTM language model": (LanguageModel(), text),
        "transformer": (Transformer(), text),
    }
    rows, results = [], {}
    for name, (plain, (x, y)) in cases.items():
        response = best_response(plain, N)
        calls = contestants(response, plain, x, y)
        unit = calls.pop("plain")
        times = interleave(calls, {"U": unit}, rounds=arguments.rounds, threads=arguments.threads)
        base = live_memory(unit)
        for form, call in calls.items():
            memory = live_memory(call) / base
            of = times[form]
            rows.append([name, form, of.units["U"].text(), f"{1e3 * of.seconds.median:.0f}", f"{memory:.2f}"])
            results[f"{name}, {form}"] = {"time": times[form], "memory": memory}
        results[f"{name}, parameters"] = response.num_parameters()
    print_table(["network", "form", "U [quartiles]", "ms", "memory / plain's"], rows)
    report(arguments, results, packages=("torchvision",), load_before=before)
    return results


if __name__ == "__main__":
    main()
