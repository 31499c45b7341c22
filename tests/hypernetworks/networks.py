"""Networks, responses and points that the tests of this package share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nested.hypernetworks import DenseResponse, FactorisedResponse, Response, best_response

N, BATCH = 3, 4


class LanguageModel(nn.Module):
    """Embedding, LSTM and an output layer that shares the embedding's weight."""

    def __init__(self, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 6, 2, batch_first=batch_first, **options)
        self.output = nn.Linear(6, 20)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.lstm(self.embedding(tokens))[0][..., :6])


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.GroupNorm(2, 4), nn.Flatten(2),
            nn.Conv1d(4, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(45, 3), nn.LayerNorm(3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def tokens() -> Tensor:
    return torch.randint(1, 20, (BATCH, 5))  # 0 is padding: no gradient by definition


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)),
        lambda: torch.randn(BATCH, 5),
    ),
    "sequences": (lambda: nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)), lambda: torch.randn(BATCH, 2, 5)),
    "convolutions": (Convolutions, lambda: torch.randn(BATCH, 2, 6, 6)),
    "language model": (LanguageModel, tokens),
    "bidirectional": (lambda: LanguageModel(bidirectional=True), tokens),
}


ONE_POINT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        lambda: torch.randn(BATCH, 5, 8),
    ),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2), lambda: torch.randn(BATCH, 2, 4, 4)),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)),
        lambda: torch.randn(BATCH, 5),
    ),
}


WHOLE: dict[str, Callable[[nn.Module], Response]] = {
    "dense": lambda m: DenseResponse(m, N, hidden=(6, 5)),
    "factorised": lambda m: FactorisedResponse(m, N, rank=2),
}


ALL = [*CASES, *ONE_POINT, *WHOLE]


def made(name: str, train: bool = False) -> tuple[Response, nn.Module, Tensor]:
    """A response with random parameters, the module it was made of and an input."""
    torch.manual_seed(0)
    make, data = {**CASES, **ONE_POINT}.get(name, CASES["mlp"])
    module = make().double()
    x = data()
    x = x.double() if x.is_floating_point() else x
    response = WHOLE[name](module) if name in WHOLE else best_response(module, N)
    for p in response.response_parameters().values():
        nn.init.normal_(p, std=0.3)
    return response.train(train), module.train(train), x


def point(*shape: int) -> Tensor:
    return torch.randn(*shape, N, dtype=torch.float64)
