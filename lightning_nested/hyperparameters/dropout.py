"""Rates of dropout layers and of drop-connect, which drops weights instead of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_nested.arguments import checked
from lightning_nested.hyperparameters.scalar import Scalar
from lightning_nested.hyperparameters.transforms import Interval
from lightning_nested.hyperparameters.weights import BoundHyperparameter


class TunedDropout(nn.Module):
    """Dropout layer that reads its rate from :class:`DropoutRates`; made by :meth:`DropoutRates.install`."""

    rates: DropoutRates
    index: int
    batch_dim: int
    p: float
    whole_channels = False

    def forward(self, x: Tensor) -> Tensor:
        """Return x with units dropped in training, x itself in evaluation."""
        if not self.training:
            return x
        return self.rates.drop(x, self.index, self.whole_channels, self.batch_dim)

    def revert(self) -> None:
        """Become the plain layer again, with the current rate."""
        self.p = float(self.rates.rate(self.index).detach())
        for name in ("rates", "index", "batch_dim"):
            del self.__dict__[name]
        self.__class__ = nn.Dropout2d if self.whole_channels else nn.Dropout  # type: ignore[assignment]


class TunedDropout2d(TunedDropout):
    """Tuned dropout of whole channels."""

    whole_channels = True


_KINDS: dict[type[nn.Module], type[TunedDropout]] = {nn.Dropout: TunedDropout, nn.Dropout2d: TunedDropout2d}


@checked
class DropoutRates(BoundHyperparameter):
    """The rates of all ``nn.Dropout`` and ``nn.Dropout2d`` layers of a network.

    Masks are Bernoulli, which has no derivative: tuned by hypernetworks. With ``temperature`` they are relaxed
    (Gal, Hron & Kendall 2017, arXiv 1705.07832), and implicit and unrolled gradients can tune the rates too.

    Args:
        per: ``"layer"``: one rate per layer; ``"model"``: one for all.
        init: Initial rate; None: the layers' own.
        upper: Bound that rates stay below.
        temperature: Temperature of relaxed masks; None: hard masks.
        name: Attribute of the module that it becomes, and key in logs.
    """

    per_example = True
    usage = "self.dropout.install(self.network)  # once, in __init__"

    def __init__(
        self,
        per: Literal["layer", "model"] = "layer",
        init: float | None = None,
        upper: float = 0.9,
        temperature: float | None = None,
        name: str = "dropout",
    ) -> None:
        super().__init__()
        if not 0 < upper < 1 or (init is not None and not 0 < init < upper):
            raise ValueError(f"0 < init < upper < 1 must hold. Got init={init}, upper={upper}.")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be positive, or None. Got {temperature}.")
        self.per, self.init, self.upper, self.name, self.temperature = per, init, upper, name, temperature
        self.transform = Interval(lower=0.0, upper=upper)
        self._start: list[float] = []

    def install(self, network: nn.Module, batch_dim: int = 0) -> None:
        """Let the dropout layers of ``network`` read their rates here, in place; to be called before :meth:`build`.

        ``batch_dim`` is the dimension of the examples in the layers' inputs.
        """
        for index, layer in enumerate(self._found(network)):
            start = float(getattr(layer, "p", 0.0)) if self.init is None else self.init
            if not 0 < start < self.upper:
                raise ValueError(
                    f"A rate must begin inside (0, {self.upper}). Got {start} of dropout layer {index}; give init=."
                )
            self._start.append(start)
            layer.__class__ = _KINDS[type(layer)]
            index = index if self.per == "layer" else 0
            layer.__dict__.update({"rates": self, "index": index, "batch_dim": batch_dim})
        if self.per == "model":
            self._start = [sum(self._start) / len(self._start)]

    def count(self, network: nn.Module) -> int:
        """Return the number of rates that ``network`` needs."""
        return len(self._found(network)) if self.per == "layer" else 1

    def _found(self, network: nn.Module) -> list[nn.Module]:
        found = [m for m in network.modules() if type(m) in _KINDS]
        if not found:
            raise ValueError(
                "DropoutRates needs layers nn.Dropout or nn.Dropout2d. "
                f"Got none in {type(network).__name__}; leave it out, or add the layers."
            )
        return found

    def kind(self) -> dict[str, Any]:
        """Add ``per``: one rate for each layer, or one for the model."""
        return {**super().kind(), "per": self.per}

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        start = self._start or ([self.init] if self.init is not None else [])
        if not start:
            raise ValueError("DropoutRates needs its layers. Got none; call install(network), or give init=.")
        return {"rates": torch.tensor(start, dtype=dtype)}

    def rate(self, index: int = 0) -> Tensor:
        """Return a rate in natural units: (), or (batch,)."""
        return self.transform.forward(self.raw("rates"))[..., index]

    def drop(self, x: Tensor, index: int = 0, whole_channels: bool = False, batch_dim: int = 0) -> Tensor:
        """Return x·mask/(1 − p); dimension ``batch_dim`` counts examples."""
        shape = [1] * x.dim()
        shape[batch_dim] = -1
        keep = 1 - self.rate(index).to(x.dtype).reshape(shape)
        noise = torch.rand(x.shape[:2] + (1,) * (x.dim() - 2) if whole_channels else x.shape, device=x.device)
        noise = noise.to(x.dtype)
        if self.temperature is None:
            keep = keep.detach()
            return x * (noise < keep) / keep
        noise = noise.clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid((keep.logit(eps=1e-6) + noise.logit()) / self.temperature)
        return x * soft / keep

    def __call__(self, x: Tensor) -> Tensor:
        """Drop units of x at the first rate, in networks that call this object themselves."""
        return self.drop(x)


@checked
class DropConnect(Scalar):
    """Each weight of the chosen tensors is zero with probability p, one mask for the batch.

    ``drop_connect(weights)`` returns the weights to use, by name. :class:`HypernetworkModule` calls it in training;
    elsewhere use ``torch.func.functional_call``. Wan et al. (2013), ICML, PMLR 28:1058-1066.

    Args:
        init: Initial p.
        upper: Bound that p stays below.
        include: Names of parameters, with ``*`` wildcards; tensors of one dimension are never dropped.
        name: Attribute of the module that it becomes, and key in logs.
    """

    per_example = False
    usage = "weights = self.drop_connect(dict(self.network.named_parameters()))"

    def __init__(
        self,
        init: float = 0.1,
        upper: float = 0.9,
        include: str | Sequence[str] = ("*",),
        name: str = "drop_connect",
    ) -> None:
        super().__init__(name, init, Interval(lower=0.0, upper=upper))
        self.include = tuple([include] if isinstance(include, str) else include)

    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return w·mask/(1 − p) for each chosen tensor, the others as they are."""
        keep, result = 1 - self.value().detach(), dict(weights)
        for name, w in weights.items():
            if w.dim() > 1 and any(fnmatchcase(name, pattern) for pattern in self.include):
                result[name] = w * (torch.rand(w.shape, device=w.device) < keep) / keep.to(w.dtype)
        return result
