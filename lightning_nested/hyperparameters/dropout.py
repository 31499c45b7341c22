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
from lightning_nested.networks.sequence_dropout import SequenceDropout, WordDropout, word_noise


class TunedDropout(nn.Module):
    """Dropout layer that reads its rate from :class:`DropoutRates`; made by :meth:`DropoutRates.install`."""

    rates: DropoutRates
    index: int
    batch_dim: int
    p: float
    plain: type[nn.Module] = nn.Dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return x with units dropped in training, x itself in evaluation."""
        return x * self._scale(self._noise(x), x) if self.training else x

    def _noise(self, x: Tensor) -> Tensor:
        """Return uniform noise: one number for what is dropped together."""
        return torch.rand(x.shape, device=x.device)

    def _scale(self, noise: Tensor, x: Tensor) -> Tensor:
        return self.rates.scale(noise.to(x.dtype), self.index, self.batch_dim)

    def revert(self) -> None:
        """Become the plain layer again, with the current rate."""
        self.p = float(self.rates.rate(self.index).detach())
        for name in ("rates", "index", "batch_dim"):
            del self.__dict__[name]
        self.__class__ = self.plain  # type: ignore[assignment]


class TunedDropout2d(TunedDropout):
    """Tuned dropout of whole channels."""

    plain = nn.Dropout2d

    def _noise(self, x: Tensor) -> Tensor:
        return torch.rand(x.shape[:2] + (1,) * (x.dim() - 2), device=x.device)


class TunedSequenceDropout(TunedDropout):
    """Tuned dropout of the same units at each step of a sequence."""

    plain = SequenceDropout

    def _noise(self, x: Tensor) -> Tensor:
        return torch.rand(x.shape[0], 1, x.shape[2], device=x.device)


class TunedWordDropout(TunedDropout):
    """Tuned dropout of words."""

    plain = WordDropout

    def forward(self, x: Tensor, words: Tensor) -> Tensor:  # type: ignore[override]
        """Return the words' vectors x (batch, length, width) with some words dropped in training."""
        return x * self._scale(word_noise(words), x) if self.training else x


_KINDS: dict[type[nn.Module], type[TunedDropout]] = {
    kind.plain: kind for kind in (TunedDropout, TunedDropout2d, TunedSequenceDropout, TunedWordDropout)
}


@checked
class DropoutRates(BoundHyperparameter):
    """The rates of all layers ``nn.Dropout``, ``nn.Dropout2d``, ``SequenceDropout`` and ``WordDropout`` of a network.

    In a fit the layers of the module are found, and read their rates here until it ends; they keep the last ones.
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
    usage = "self.dropout = None  # in __init__; layers nn.Dropout read their rates by themselves"

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
        _check_temperature(temperature)
        self.per, self.init, self.upper, self.name, self.temperature = per, init, upper, name, temperature
        self.transform = Interval(lower=0.0, upper=upper)
        self._start: list[float] = []
        self._layers: list[TunedDropout] = []  # those that read their rates here for one fit
        self.layer_names: tuple[str, ...] = ()

    def install(self, network: nn.Module, batch_dim: int = 0) -> None:
        """Let the dropout layers of ``network`` read their rates here, in place; to be called before :meth:`build`.

        ``batch_dim`` is the dimension of the examples in the layers' inputs.
        """
        found = self._found(network)
        starts = [float(getattr(m, "p", 0.0)) if self.init is None else self.init for m in found.values()]
        # All are checked before any is changed.
        for name, start in zip(found, starts, strict=True):
            if not 0 < start < self.upper:
                raise ValueError(
                    f"A rate must begin inside (0, {self.upper}). Got {start} of dropout layer {name!r}; give init=."
                )
        self.layer_names = tuple(found)
        self._start += starts
        for index, layer in enumerate(found.values()):
            layer.__class__ = _KINDS[type(layer)]
            index = index if self.per == "layer" else 0
            layer.__dict__.update({"rates": self, "index": index, "batch_dim": batch_dim})
        if self.per == "model":
            self._start = [sum(self._start) / len(self._start)]

    def attach_module(self, module: nn.Module) -> None:
        """Install in ``module`` for one fit, unless :meth:`install` was called for its layers."""
        if any(isinstance(m, TunedDropout) and m.rates is self for m in module.modules()):
            return
        self._start = []
        self.install(module)
        self._layers = [m for m in module.modules() if isinstance(m, TunedDropout) and m.rates is self]

    def detach_module(self) -> None:
        """Make the layers plain again, with the current rates."""
        while self._layers:
            self._layers.pop().revert()

    def count(self, network: nn.Module) -> int:
        """Return the number of rates that ``network`` needs."""
        return len(self._found(network)) if self.per == "layer" else 1

    def _found(self, network: nn.Module) -> dict[str, nn.Module]:
        found = {name: m for name, m in network.named_modules() if type(m) in _KINDS}
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

    def scale(self, noise: Tensor, index: int = 0, batch_dim: int = 0) -> Tensor:
        """Return mask/(1 − p) of the shape of ``noise``, uniform in [0, 1); dimension ``batch_dim`` counts examples."""
        shape = [1] * noise.dim()
        shape[batch_dim] = -1
        keep = 1 - self.rate(index).to(noise.dtype).reshape(shape)
        return _scale(keep, noise, self.temperature)

    def drop(self, x: Tensor, index: int = 0, batch_dim: int = 0) -> Tensor:
        """Return x·mask/(1 − p); dimension ``batch_dim`` counts examples."""
        return x * self.scale(torch.rand(x.shape, device=x.device).to(x.dtype), index, batch_dim)

    def __call__(self, x: Tensor) -> Tensor:
        """Drop units of x at the first rate, in networks that call this object themselves."""
        return self.drop(x)


def _scale(keep: Tensor, noise: Tensor, temperature: float | None) -> Tensor:
    """Return mask/keep: a mask of zeros and ones, or a relaxed one with its graph to ``keep``."""
    if temperature is None:
        keep = keep.detach()
        return (noise < keep) / keep
    noise = noise.clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid((keep.logit(eps=1e-6) + noise.logit()) / temperature) / keep


@checked
class DropConnect(Scalar):
    """Each weight of the chosen tensors is zero with probability p, one mask for the batch.

    ``drop_connect(weights)`` returns the weights to use, by name. :class:`HypernetworkModule` calls it in training;
    elsewhere use ``torch.func.functional_call``. Masks are Bernoulli, which has no derivative: tuned by hypernetworks.
    With ``temperature`` they are relaxed (Gal, Hron & Kendall 2017, arXiv 1705.07832), and implicit and unrolled
    gradients can tune p too. Wan et al. (2013), ICML, PMLR 28:1058-1066.

    Args:
        init: Initial p.
        upper: Bound that p stays below.
        include: Names of parameters, with ``*`` wildcards; tensors of one dimension are never dropped. Names are those
            that ``drop_connect`` is called with.
        name: Attribute of the module that it becomes, and key in logs.
        per: ``"model"``: one p; ``"tensor"``: one per tensor; ``"parameter"``: one per weight.
        temperature: Temperature of relaxed masks; None: hard masks.
    """

    per_example = False
    usage = (
        "self.drop_connect = None  # in __init__\n"
        "weights = dict(self.network.named_parameters())  # in the training loss\n"
        "if self.drop_connect is not None:\n"
        "    weights = self.drop_connect(weights)\n"
        "out = torch.func.functional_call(self.network, weights, (x,))"
    )

    def __init__(
        self,
        init: float = 0.1,
        upper: float = 0.9,
        include: str | Sequence[str] = ("*",),
        name: str = "drop_connect",
        per: Literal["model", "tensor", "parameter"] = "model",
        temperature: float | None = None,
    ) -> None:
        super().__init__(name, init, Interval(lower=0.0, upper=upper))
        _check_temperature(temperature)
        self.include = tuple([include] if isinstance(include, str) else include)
        self.per, self.temperature = per, temperature
        self._shapes: dict[str, torch.Size] = {}  # of the dropped parameters, once built

    def kind(self) -> dict[str, Any]:
        """Add ``per``: one rate for all, for each tensor, or for each weight."""
        return {**super().kind(), "per": self.per}

    def build(self, parameters: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Create the tensors: one number, or one tensor for each dropped parameter.

        Raises:
            ValueError: No parameter has a name in ``include``; asked only where rates are of single tensors or weights.
        """
        if self.per != "model":
            chosen = {n: p.shape for n, p in parameters.items() if p.dim() > 1 and self._is_meant(n)}
            if not chosen:
                raise ValueError(
                    f"include must match the name of a parameter of two or more dimensions. Got {self.include}, which "
                    f"matches none of {', '.join(list(parameters)[:5])}."
                )
            self._shapes = chosen
        super().build(parameters, device)

    def _is_meant(self, name: str) -> bool:
        """Return True if ``include`` has ``name``, as the module or a network inside it calls the parameter."""
        parts = name.split(".")
        ends = [".".join(parts[k:]) for k in range(len(parts))]
        return any(fnmatchcase(end, pattern) for end in ends for pattern in self.include)

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.per == "model":
            return super()._initial(dtype)
        shapes = {n: s if self.per == "parameter" else torch.Size() for n, s in self._shapes.items()}
        return {name: torch.full(shape, self.init, dtype=dtype) for name, shape in shapes.items()}

    def rate(self, name: str) -> Tensor:
        """Return p of a parameter in natural units, a number or one of each weight.

        Args:
            name: Its name, as the module or a network inside it calls it.

        Raises:
            ValueError: It is no dropped parameter, or several end in this name.
        """
        if self.per == "model" or not self.built:
            # Before they are built all rates are the initial one.
            return self.value() if self.per == "model" else torch.tensor(self.init)
        keys = [k for k in self.tensors if k == name or k.endswith("." + name) or name.endswith("." + k)]
        if name not in keys and len(keys) != 1:
            raise ValueError(
                f"The name of a weight must be one of {list(self.tensors)}, or the end of one. Got {name!r}; call "
                "drop_connect with the names of named_parameters()."
            )
        key = name if name in keys else keys[0]
        return self.natural(key, self.tensors[key])

    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return w·mask/(1 − p) for each chosen tensor, the others as they are."""
        result = dict(weights)
        for name, w in weights.items():
            if w.dim() > 1 and any(fnmatchcase(name, pattern) for pattern in self.include):
                noise = torch.rand(w.shape, device=w.device).to(w.dtype)
                keep = 1 - self.rate(name).to(w.device, w.dtype)
                result[name] = w * _scale(keep, noise, self.temperature)
        return result


def _check_temperature(temperature: float | None) -> None:
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be positive, or None. Got {temperature}.")
