"""Weight decay ½ Σᵢ dᵢ wᵢ², with every derivative in closed form: one decay, one per tensor, or one per weight."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_nested.arguments import checked
from lightning_nested.hyperparameters.carry_over import carry_entries
from lightning_nested.hyperparameters.hyperparameter import Hyperparameter
from lightning_nested.hyperparameters.transforms import Exp, Transform
from lightning_nested.linalg.operators import DiagonalOperator, LinearOperator
from lightning_nested.linalg.vectors import Vector


@checked
class WeightDecay(Hyperparameter):
    """L2 penalty ½ Σᵢ dᵢ wᵢ² on the inner loss, with d tuned.

    No graph is built for it: the gradient dᵢwᵢ is added to ``.grad``, the curvature is diag(d), and the mixed
    derivative is diagonal, vᵀ∂²P/∂w∂λ = vᵢ wᵢ ∂dᵢ/∂λᵢ.

    Args:
        per: ``"model"``: one decay; ``"tensor"``: one per parameter tensor; ``"parameter"``: one per weight.
        init: Initial decay in natural units (as ``weight_decay`` of ``torch.optim.SGD``).
        include: Names of parameters that are decayed, with ``*`` wildcards.
        exclude: Names that are not, with ``*`` wildcards.
        transform: Map from the unconstrained tensor to the decay; default ``Exp`` within [1e-12, 1]: SGD diverges
            above about 2(1 + β)/rate.
        name: Key in logs and checkpoints.
    """

    def __init__(
        self,
        per: Literal["model", "tensor", "parameter"] = "tensor",
        init: float = 1e-4,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        transform: Transform | None = None,
        name: str = "weight_decay",
    ) -> None:
        super().__init__()
        if not init > 0:
            raise ValueError(f"init must be positive and finite. Got {init}; for nearly no decay give 1e-12.")
        self.per, self.init, self.name = per, init, name
        self.include, self.exclude = _patterns("include", include), _patterns("exclude", exclude)
        self._use(transform or Exp(lower=min(1e-12, init), upper=max(1.0, 2 * init)), init)
        self.parameter_names: tuple[str, ...] = ()
        self._shapes: dict[str, torch.Size] = {}  # of the decayed parameters
        # Patterns that have matched a name: the parameters they match may be frozen later.
        self._matched: set[str] = set()
        # Unconstrained decays of parameters that were frozen, for when they come back.
        self._frozen: dict[str, Tensor] = {}

    def build(self, parameters: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Create one unconstrained tensor: shapes (), (number of tensors,), or as the parameters.

        A second call, with parameters that were added (unfrozen) or removed (frozen), keeps the decays of those that
        stay or come back; new ones start at ``init``.
        """
        for pattern in {*self.include, *self.exclude} - self._matched:
            if not any(fnmatchcase(name, pattern) for name in parameters):
                close = difflib.get_close_matches(pattern, parameters, n=3, cutoff=0.4)
                raise ValueError(
                    f"include and exclude must match parameter names. Got {pattern!r}, which matches none; "
                    f"close names: {', '.join(close) or ', '.join(list(parameters)[:5])}."
                )
        chosen = {name: p for name, p in parameters.items() if self._decays(name)}
        if not chosen:
            raise ValueError(
                f"At least one parameter must be decayed. Got include={self.include}, exclude={self.exclude}, "
                f"which leaves none of {len(parameters)}."
            )
        self._matched = {*self.include, *self.exclude}
        before, self.parameter_names = self.parameter_names, tuple(chosen)
        self._shapes = {name: p.shape for name, p in chosen.items()}
        # The entries of an earlier vector are the decays of others, even if it has the same size.
        earlier = self.tensors.pop("tensor", None) if before != self.parameter_names else None
        gone = set(before) - set(chosen)
        self._frozen.update({name: raw.detach() for name, raw in self.tensors.items() if name in gone})
        super().build(chosen, device)
        if earlier is not None:
            self._frozen.update(zip(before, earlier.detach().unbind(), strict=True))
            kept = carry_entries(earlier, self.tensors["tensor"], before, self.parameter_names)
            if kept is not None:
                self.tensors["tensor"] = kept.requires_grad_(True)
        self._thaw(before)

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        shapes: Mapping[str, Sequence[int]] = self._shapes
        if self.per != "parameter":
            shapes = {self.per: () if self.per == "model" else (len(shapes),)}
        return {key: torch.full(tuple(shape), self.init, dtype=dtype) for key, shape in shapes.items()}

    @torch.no_grad()
    def _thaw(self, before: Sequence[str]) -> None:
        """Give parameters that were not among those ``before``, but once were, the decays they had."""
        vector = self.tensors.get("tensor") if self.per == "tensor" else None
        for i, name in enumerate(self.parameter_names):
            had = self._frozen.pop(name, None)
            now = self.tensors.get(name) if vector is None else vector[i]
            if had is not None and now is not None and name not in before and had.shape == now.shape:
                now.copy_(had)

    def reset(self) -> None:
        """Forget the decays and their parameters."""
        super().reset()
        self.parameter_names, self._matched, self._frozen = (), set(), {}

    def entries(self) -> tuple[str, ...] | None:
        """Return the names of the parameters, with ``per="tensor"``."""
        return self.parameter_names if self.per == "tensor" else None

    def kind(self) -> dict[str, Any]:
        """Return ``per`` and the names of the parameters too."""
        return {**super().kind(), "per": self.per, "entries": list(self.parameter_names)}

    def _arrange(self, state: Mapping[str, Tensor], entries: Sequence[str] | None) -> Mapping[str, Tensor]:
        # Decays of other parameters, some of them the same: layers are frozen now that were not, or the other way
        # round. They are taken as they are, and the next build goes on from there as it does in training.
        names = tuple(entries or ())
        shared = set(names) & set(self.parameter_names)
        if self.per == "model" or not shared or names == self.parameter_names:
            return super()._arrange(state, entries)
        if self.per == "parameter":
            for key in shared:
                if state[key].shape != self.tensors[key].shape:
                    return super()._arrange({**self.tensors, key: state[key]}, entries)
        like = next(iter(self.tensors.values()))
        self.tensors = {key: raw.detach().to(like).clone().requires_grad_(True) for key, raw in state.items()}
        self.parameter_names = names
        return state

    def decays(self) -> dict[str, Tensor]:
        """Return each chosen parameter's decay by name, with the graph to the unconstrained tensors."""
        if self.per == "parameter":
            return {name: self.transform.forward(raw) for name, raw in self.tensors.items()}
        value = self.transform.forward(self.tensors[self.per])
        each = value.unbind() if self.per == "tensor" else [value] * len(self.parameter_names)
        return dict(zip(self.parameter_names, each, strict=True))

    @torch.no_grad()
    def add_gradient_(self, parameters: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """grad ← grad + scale · d ∘ w for every chosen parameter that has a gradient.

        ``scale`` is the factor that gradients carry (a GradScaler's, before a fused optimizer takes it off).
        """
        for name, decay in self.decays().items():
            parameter = parameters[name]
            if parameter.grad is not None:
                parameter.grad.addcmul_(decay.to(parameter.grad.dtype), parameter, value=scale)

    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """½ Σ d w² as a scalar with its graph, for inner losses that are written out."""
        return torch.stack([0.5 * (d * parameters[n] ** 2).sum() for n, d in self.decays().items()]).sum()

    def linearize(self, parameters: Mapping[str, Tensor]) -> DecayPenalty:
        """Return the penalty's derivatives at the current parameters, which in this order form the vector w."""
        return DecayPenalty(self, parameters)

    def _decays(self, name: str) -> bool:
        included, excluded = (
            any(fnmatchcase(name, p) for p in patterns) for patterns in (self.include, self.exclude)
        )
        return included and not excluded


class FixedDecay:
    """Penalty of a decay that is not tuned, one number per parameter: curvature without a mixed derivative."""

    def __init__(self, decay: Sequence[float]) -> None:
        self._operator = DiagonalOperator(list(decay))

    def curvature(self) -> LinearOperator:
        """diag(d)."""
        return self._operator

    def mixed(self, v: Vector) -> Vector:
        """Return no derivatives."""
        return ()


class DecayPenalty:
    """Closed-form curvature diag(d) and mixed derivative of a :class:`WeightDecay` at fixed parameters."""

    def __init__(self, decay: WeightDecay, parameters: Mapping[str, Tensor]) -> None:
        self._decay = decay
        self._names = tuple(parameters)
        self._parameters = {name: parameters[name].detach() for name in decay.parameter_names}
        with torch.enable_grad():
            self._values = decay.decays()

    def curvature(self) -> LinearOperator:
        """diag(d), zero for parameters that are not decayed."""
        return DiagonalOperator([self._values[n].detach() if n in self._values else 0.0 for n in self._names])

    def mixed(self, v: Vector) -> Vector:
        """vᵢ wᵢ ∂dᵢ/∂λᵢ, summed over the weights that share a decay."""
        by_name = dict(zip(self._names, v, strict=True))
        if self._decay.per == "parameter":
            slopes = [(self._parameters[n] * by_name[n]).to(d.dtype) for n, d in self._values.items()]
        else:
            # One number per tensor: the dot products first, so that nothing of the model's size has a graph.
            values = self._values.items()
            slopes = [torch.sum(self._parameters[n] * by_name[n], dtype=d.dtype) for n, d in values]
        tensors = tuple(self._decay.tensors.values())
        return torch.autograd.grad(list(self._values.values()), tensors, slopes, retain_graph=True)


def _patterns(name: str, patterns: Sequence[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise ValueError(f"{name} must be a list of names. Got string {patterns!r}; write [{patterns!r}].")
    return tuple(patterns)
