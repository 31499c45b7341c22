"""Weight decay ½ Σᵢ dᵢ wᵢ², with every derivative in closed form: one decay, one per tensor, or one per weight."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_nested.arguments import check, within
from lightning_nested.hyperparameters.carry_over import carry_entries
from lightning_nested.hyperparameters.hyperparameter import Hyperparameter
from lightning_nested.hyperparameters.name_patterns import check_patterns, matches
from lightning_nested.hyperparameters.transforms import Exp, Transform
from lightning_nested.linalg.operators import DiagonalOperator, LinearOperator
from lightning_nested.linalg.shards import added_up, parts
from lightning_nested.linalg.vectors import Vector

_INIT = 1e-4
# Units of the run, see WeightDecay.fit_to_run.
_START, _SMALLEST, _LARGEST = 3.0, 0.1, 15.0
# Passes through the training data from which a run has the whole start.
_PASSES = 10
# Share of its start that a decay ends at, if the start was far too large; or at the floor, if that is near.
_FAR, _NEAR_FLOOR = 0.2, 1.2


class WeightDecay(Hyperparameter):
    """L2 penalty ½ Σᵢ dᵢ wᵢ² on the inner loss, with d tuned.

    No graph is built for it: the gradient dᵢwᵢ is added to ``.grad``, the curvature is diag(d), and the mixed
    derivative is diagonal, vᵀ∂²P/∂w∂λ = vᵢ wᵢ ∂dᵢ/∂λᵢ.

    Args:
        per: ``"model"``: one decay; ``"tensor"``: one per parameter tensor; ``"parameter"``: one per weight, see
            ``shrink``.
        init: Initial decay in natural units (as ``weight_decay`` of the inner optimizer); None: the decay that shrinks
            a weight without gradient by e⁻³ over the run, and less in a run of few epochs, see :meth:`fit_to_run`;
            1e-4 where its length is not known.
        include: Names of parameters that are decayed, with ``*`` wildcards; None: those with two dimensions and more,
            not biases and norms.
        exclude: Names that are not, with ``*`` wildcards.
        transform: Map from the unconstrained tensor to the decay; default ``Exp`` within [1e-12, 1] (SGD diverges
            above about 2(1 + β)/rate), and in a run of known length within the bounds of :meth:`fit_to_run`, which
            may lie above 1. A transform of your own keeps its bounds.
        name: Key in logs and checkpoints.
        shrink: Share by which the steps of single weights are shortened towards that of their tensor, with
            ``per="parameter"``: 1 is one decay per tensor, 0 lets every weight take its own. None: as much as
            successive outer batches disagree, see :class:`SharedAdam`, so that noise and a small validation set are not
            fitted. Acts in the default outer optimizer of ``HypergradientCallback``; others move each weight's decay by
            its own hypergradient.

    Raises:
        ValueError: A start or a share is out of range; ``shrink`` with another ``per``; ``per="feature"``.
    """

    def __init__(
        self,
        per: Literal["model", "tensor", "parameter"] = "tensor",
        init: float | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        transform: Transform | None = None,
        name: str = "weight_decay",
        shrink: float | None = None,
    ) -> None:
        if str(per) == "feature":
            raise ValueError(
                "per must be 'model', 'tensor' or 'parameter'. Got 'feature'; for a decay of each input column take "
                "FeatureDecay(num_features)."
            )
        check(WeightDecay.__init__, locals())
        super().__init__()
        if shrink is not None:
            within(0, 1, shrink=shrink)
            if per != "parameter":
                raise ValueError(f'shrink needs per="parameter". Got per={per!r}; leave shrink out.')
        if init is not None and not init > 0:
            raise ValueError(f"init must be positive and finite. Got {init}; for nearly no decay give 1e-12.")
        self.per, self.init, self.name, self.shrink = per, init, name, shrink
        self.include = None if include is None else tuple(include)
        self.exclude = tuple(exclude)
        start = init if init is not None else _INIT
        self._use(transform or Exp(lower=min(1e-12, start), upper=max(1.0, 2 * start)), start)
        self._default_transform = transform is None
        # One unit by name, and the first and the largest decay in units, once they are fitted to a run.
        self._units: dict[str, float] = {}
        self._first, self._largest = _START, _LARGEST
        # The decays, as numbers where they are few, with the tensors and their versions that they are of.
        self._numbers: tuple[tuple[Tensor, ...], tuple[object, ...], Mapping[str, Tensor | float]] | None = (
            None
        )
        self.parameter_names: tuple[str, ...] = ()
        self._shapes: dict[str, torch.Size] = {}  # of the decayed parameters
        # Patterns that have matched a name: the parameters they match may be frozen later.
        self._matched: set[str] = set()
        # Names of parameters that lazy layers will have from their first batch on.
        self.awaited: tuple[str, ...] = ()
        # Unconstrained decays of parameters that were frozen, for when they come back.
        self._frozen: dict[str, Tensor] = {}

    def build(self, parameters: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Create one unconstrained tensor: shapes (), (number of tensors,), or as the parameters.

        A second call, with parameters that were added (unfrozen) or removed (frozen), keeps the decays of those that
        stay or come back; new ones start at ``init``.
        """
        check_patterns({*(self.include or ()), *self.exclude} - self._matched, [*parameters, *self.awaited])
        chosen = self._chosen(parameters)
        if not chosen:
            raise ValueError(
                f"At least one parameter must be decayed. Got include={self.include}, exclude={self.exclude}, "
                f"which leaves none of {len(parameters)}{', before lazy layers have a batch' * bool(self.awaited)}."
            )
        self._matched = {*(self.include or ()), *self.exclude}
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
        if self.init is None and self._units:
            return {
                key: self._run_units(key, self._first).to(dtype).expand(tuple(s)) for key, s in shapes.items()
            }
        start = self.init if self.init is not None else _INIT
        return {key: torch.full(tuple(shape), start, dtype=dtype) for key, shape in shapes.items()}

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
        self.parameter_names, self._matched, self._frozen, self._units = (), set(), {}, {}

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
    def shrink_(self, parameters: Mapping[str, Tensor], rates: Mapping[int, float]) -> None:
        """w ← (1 − rate·d) ∘ w for every chosen parameter that has a gradient: the decoupled decay of AdamW.

        ``rates`` are learning rates by the ``id`` of the parameters.
        """
        numbers: list[tuple[Tensor, float]] = []
        for name, decay in self._applied().items():
            parameter = parameters[name]
            if parameter.grad is None or id(parameter) not in rates:
                continue
            if isinstance(decay, Tensor):
                parameter.mul_((1 - rates[id(parameter)] * decay).to(parameter.dtype))
            else:
                numbers.append((parameter, 1 - rates[id(parameter)] * decay))
        if numbers:
            torch._foreach_mul_([p for p, _ in numbers], [factor for _, factor in numbers])

    @torch.no_grad()
    def add_gradient_(
        self, parameters: Mapping[str, Tensor], scale: float = 1.0, decoupled: Container[int] = ()
    ) -> None:
        """grad ← grad + scale · d ∘ w for every chosen parameter that has a gradient.

        Args:
            parameters: Inner parameters by name.
            scale: Factor that gradients carry (a GradScaler's, before a fused optimizer takes it off).
            decoupled: The ``id`` of parameters that :meth:`shrink_` decays.

        Raises:
            ValueError: A gradient is sparse.
        """
        for name, decay in self._applied().items():
            parameter = parameters[name]
            gradient = parameter.grad
            if gradient is None or id(parameter) in decoupled:
                continue
            if gradient.is_sparse:
                raise ValueError(
                    f"A weight decay needs dense gradients. Got a sparse one of {name!r}; build the layer with "
                    f"sparse=False, or leave it out: WeightDecay(exclude=[{name!r}])."
                )
            if isinstance(decay, Tensor):
                gradient.addcmul_(decay.to(gradient.dtype), parameter, value=scale)
            else:
                gradient.add_(parameter, alpha=decay * scale)

    def _applied(self) -> Mapping[str, Tensor | float]:
        """Return the decays by name, as numbers where they are few: read once for each change of the tensors."""
        raws = tuple(self.tensors.values())
        key = (tuple(raw._version for raw in raws), self.parameter_names)
        kept = self._numbers
        if kept is None or kept[1] != key or any(a is not b for a, b in zip(kept[0], raws, strict=True)):
            found: Mapping[str, Tensor | float]
            if self.per == "parameter":
                found = {name: decay.detach() for name, decay in self.decays().items()}
            else:
                values = self.transform.forward(raws[0].detach()).double().reshape(-1).tolist()
                each = values if self.per == "tensor" else values * len(self.parameter_names)
                found = dict(zip(self.parameter_names, each, strict=True))
            self._numbers = kept = raws, key, found
        return kept[2]

    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """½ Σ d w² as a scalar with its graph, for inner losses that are written out."""
        return torch.stack([0.5 * (d * parameters[n] ** 2).sum() for n, d in self.decays().items()]).sum()

    def linearize(
        self, parameters: Mapping[str, Tensor], factors: Mapping[str, Tensor] | None = None
    ) -> DecayPenalty:
        """Return the penalty's derivatives at the current parameters, which in this order form the vector w.

        Args:
            parameters: Inner parameters by name.
            factors: Factors on the decay by name, each a tensor of the parameter's shape: a decoupled decay λ acts as a
                coupled one of λ(√v̂ + ε) under AdamW.
        """
        return DecayPenalty(self, parameters, factors or {})

    def _chosen(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters that are decayed."""
        left = {name: p for name, p in parameters.items() if not matches(name, self.exclude)}
        if self.include is not None:
            return {name: p for name, p in left.items() if matches(name, self.include)}
        # A network of vectors alone has no other weights.
        return {name: p for name, p in left.items() if p.dim() >= 2} or left

    # ---- a scale from the run

    @torch.no_grad()
    def fit_to_run(
        self, units: Mapping[str, float], steps: float, *, passes: float = math.inf, restart: bool
    ) -> None:
        """Start from the length of the run, and bound the decays by it.

        A decay of one unit shrinks a weight that gets no gradient by a factor e in the run: 1/(lr·steps) for a
        decoupled decay, mean(1/R)/steps for a coupled one, with R the optimizer's long-run step per unit of gradient.
        The decays start at three units, which was within a few per cent of the best fixed decay on most tasks that
        were tried, and stay within a tenth of a unit and 15 units; for the time scale see Wang & Aitchison (2024),
        arXiv:2405.13698. A run of p < 10 passes through its data, which hardly overfits, starts at 3p/10 units.

        Args:
            units: One unit for each decayed parameter by name; those that are unfrozen later take the mean.
            steps: Inner steps of the run; decays are at most a tenth of them in units, beyond which they are unstable.
            passes: Passes of the run through its data, p; infinite where unknown.
            restart: Whether the decays move to their start; else they are only bounded.
        """
        if not self._default_transform:
            return
        self._units = {name: max(unit, 1e-10) for name, unit in units.items()}
        self._first = max(_SMALLEST, _START * min(1.0, passes / _PASSES))
        self._largest = min(_LARGEST, 0.1 * steps)
        upper = max(getattr(self.transform, "upper", 1.0), 2 * self._largest * max(self._units.values()))
        self.transform = Exp(lower=1e-12, upper=upper)
        if restart:
            for key, raw in self.tensors.items():
                raw.copy_(self.transform.inverse(self._run_units(key, self._first).to(raw)))

    def _run_units(self, key: str, amount: float) -> Tensor:
        """Return so many units, at most the largest decay, for a tensor's entries."""
        names = (key,) if self.per == "parameter" else self.parameter_names
        mean = sum(map(math.log, self._units.values())) / len(self._units)
        logs = [math.log(self._units[name]) if name in self._units else mean for name in names]
        # One decay for the whole model has the mean of its units.
        amounts = torch.tensor(logs, dtype=torch.float64)
        return (amounts if self.per == "tensor" else amounts.mean()).exp() * min(amount, self._largest)

    def advice(self, first: float, last: float) -> str | None:
        """Return where the next run can start, if the default start was far too large for this one."""
        far = min(0.5, max(_FAR, _NEAR_FLOOR * _SMALLEST / self._first))
        if not self._units or self.init is not None or last > far * first:
            return None
        return (
            f"{self.name} began far too high for this run; for the next one give WeightDecay(init={last:.1g})"
        )

    @torch.no_grad()
    def project_(self) -> None:
        """Move the decays into the transform's range, and into the bounds of :meth:`fit_to_run`."""
        super().project_()
        for key, raw in self.tensors.items() if self._units else ():
            low, high = (
                self.transform.inverse(self._run_units(key, amount).to(raw))
                for amount in (_SMALLEST, self._largest)
            )
            raw.copy_(torch.minimum(torch.maximum(raw, low), high))


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

    def __init__(
        self, decay: WeightDecay, parameters: Mapping[str, Tensor], factors: Mapping[str, Tensor]
    ) -> None:
        self._decay = decay
        self._names, self._factors = tuple(parameters), factors
        # ∂P/∂w is factor ∘ d ∘ w
        self._parameters = {
            name: parameters[name].detach() * factors[name] if name in factors else parameters[name].detach()
            for name in decay.parameter_names
        }
        with torch.enable_grad():
            self._values = {key: decay.transform.forward(raw) for key, raw in decay.tensors.items()}
        self._decays = decay._applied()

    def curvature(self) -> LinearOperator:
        """diag(d), zero for parameters that are not decayed."""
        return DiagonalOperator([self._diagonal(name) for name in self._names])

    def _diagonal(self, name: str) -> Tensor | float:
        if name not in self._decays:
            return 0.0
        value = self._decays[name]
        return value * self._factors[name] if name in self._factors else value

    def mixed(self, v: Vector) -> Vector:
        """vᵢ wᵢ ∂dᵢ/∂λᵢ, summed over the weights that share a decay."""
        by_name, values = dict(zip(self._names, v, strict=True)), tuple(self._values.values())
        if self._decay.per == "parameter":
            slopes = [(self._parameters[n] * by_name[n]).to(d.dtype) for n, d in self._values.items()]
        else:
            # One number per tensor: the dot products first, so that nothing of the model's size has a graph.
            own, other = (
                parts(tuple(self._parameters.values())),
                parts([by_name[n] for n in self._parameters]),
            )
            sums = [torch.sum(w * a, dtype=values[0].dtype) for w, a in zip(own, other, strict=True)]
            each = added_up(torch.stack(sums), v)
            slopes = [each if self._decay.per == "tensor" else each.sum()]
        tensors = tuple(self._decay.tensors.values())
        return torch.autograd.grad(values, tensors, slopes, retain_graph=True)
