"""Checks of one fit: its first outer step is examined, and what never happened is told at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_nested.hypergradient.implicit import Inspect
from lightning_nested.hypergradient.inner_curvature import Linearization
from lightning_nested.hypergradient.mixed_check import FormedMixed, wrong_mixed
from lightning_nested.hypergradient.self_check import FormedProducts, ProductCheck, check_formed_products
from lightning_nested.hyperparameters import Hyperparameter, OuterReport, OuterStep
from lightning_nested.linalg.curvature import FiniteDifferenceOperator, HessianOperator
from lightning_nested.linalg.graph import OTHER_FORMS, DoubleBackwardError, graph_leaves, hides_layers
from lightning_nested.linalg.vectors import Vector

_WRONG_PRODUCTS = (
    "Products with the curvature are not the derivative of the training gradient: they differ by {difference:.0%} from "
    "a difference of gradients. The loss detaches a factor, or a custom torch.autograd.Function has a wrong or missing "
    "second derivative; use curvature=FiniteDifference(), or look with check_hypergradient."
)
_ASYMMETRIC = (
    "Products with the curvature are not symmetric: |uᵀHv − vᵀHu| is {asymmetry:.0%} of ‖H‖. A hook on an activation "
    "or a custom torch.autograd.Function (gradient reversal, straight-through) changes gradients, a second derivative "
    "is wrong, or rounding is too coarse (bfloat16); use precision=32, or curvature=FiniteDifference()."
)
_WRONG_MIXED = (
    "The second derivative of the training loss by the weights and {names} is not the derivative of its gradient: it "
    "differs by {difference:.0%} from a difference of gradients. A custom torch.autograd.Function has a wrong or "
    "missing second derivative, or the loss detaches a factor; use curvature=FiniteDifference(), or look with "
    "check_hypergradient."
)
_REPLACED = (
    "The training loss has no second derivative ({reason}), so products with its curvature are differences of "
    "gradients, {sides} a product, right to {error:.1g}. Give curvature=FiniteDifference() to choose them "
    f"yourself; for exact products run {OTHER_FORMS}. No second derivative is needed where the solver is the default "
    "and hyperparameters in the loss are differenced too, train_batches=2 say."
)
_NEGATIVE = (
    "The solver met a direction of negative curvature, vᵀAv/vᵀv = {curvature:.2g} with A the curvature, its damping "
    "included, and the outer step uses what it found up to there: the training loss is not near a minimum. The default "
    "solver needs no such product; or give it more damping, at least by {size:.2g}, as ConjugateGradient(damping=...), "
    "or curvature=GaussNewton(outputs=...)."
)
_ZERO = (
    "The outer loss has a gradient of exactly zero at the weights, and so every hypergradient through them is zero. "
    "Compute it from the parameters that the inner optimizer trains, without detach()."
)


class SelfCheck:
    """Examines the first hypergradient of a fit: its products, and what gradients reach.

    Costs one gradient at the first outer step where the solver forms products and one where hyperparameters are in the
    loss's graph, two in place of one where it leaves doubt, nothing later: products are those that are formed
    anyway. Changes no bit of the run.

    Args:
        owner: Class name in warnings.
        enabled: Whether products are checked.

    Attributes:
        result: What was found about products, after the first outer step.
    """

    def __init__(self, owner: str, *, enabled: bool = True) -> None:
        self.owner, self.enabled = owner, enabled
        self.result: ProductCheck | None = None
        # Graphs hold gathered parameters then, and products are differences of gradients.
        self.in_shards = False
        self.begin()

    def begin(self) -> None:
        """Begin with a new fit."""
        self._checked, self._probed = not self.enabled, not self.enabled
        self._told: set[str] = set()
        # Why differences replace second derivatives, until that is told.
        self._reason = ""
        # Labels of hyperparameters whose mixed derivatives are wrong.
        self._wrong: set[str] = set()

    @property
    def is_due(self) -> bool:
        """True until the first outer step of a fit."""
        return not self._checked

    def may_repeat(self, module: LightningModule) -> bool:
        """Return True if a step of the module may be evaluated again: it draws from no iterator, say."""
        return not any(isinstance(value, Iterator) for m in module.modules() for value in vars(m).values())

    def takes_probe(self) -> bool:
        """Return True once in a fit: the outer loss is to be evaluated now, so that its faults show before warm-up."""
        probed, self._probed = self._probed, True
        return not probed

    def probe(self, loss: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Look at the graph of an outer loss."""
        if not (self.in_shards or hides_layers(loss)) and not reached(loss, parameters):
            self._warn(_ZERO)

    def replaced(self, error: DoubleBackwardError) -> None:
        """Note that differences of gradients replace second derivatives, to be told with the error of the first."""
        self._reason = error.reason.rstrip(".")

    def inspect(
        self,
        loss: object,
        parameters: Mapping[str, Tensor],
        repeat: Callable[[], Tensor] | None,
        labels: Sequence[str] = (),
    ) -> Inspect | None:
        """Return what looks at the first hypergradient; None later.

        Args:
            loss: The training loss with its graph; anything else is not differentiated.
            parameters: Inner parameters by name.
            repeat: Evaluates the loss again.
            labels: Names of the hyperparameters in its graph, one for each tensor.
        """
        if not self.is_due or self.in_shards:
            return None

        @contextmanager
        def look(problem: Linearization | None, v: Vector) -> Iterator[Linearization | None]:
            if not any(bool(a.any()) for a in v):
                self._warn(_ZERO)
            if problem is None:
                yield None
                return
            self._tell_replaced(problem)
            # A difference of gradients says more than a second product.
            others = 0 if repeat is not None and isinstance(problem.curvature, HessianOperator) else 2
            formed = FormedProducts(problem.curvature, v, others=others)
            mixed = FormedMixed(problem.mixed)
            try:
                yield replace(problem, curvature=formed, mixed=mixed)
            except FloatingPointError:  # which wrong products may be the reason of
                self._compare(problem, formed, loss, parameters, repeat)
                raise
            right = self._compare(problem, formed, loss, parameters, repeat)
            exact = not isinstance(problem.curvature, FiniteDifferenceOperator)
            if right and exact and repeat is not None and isinstance(loss, Tensor):
                self._compare_mixed(mixed, loss, parameters, repeat, labels)

        return look

    def _tell_replaced(self, problem: Linearization) -> None:
        operator, reason = problem.curvature, self._reason
        if reason and isinstance(operator, FiniteDifferenceOperator):
            self._reason, sides = "", "one" if operator.sides == 1 else "two"
            self._warn(_REPLACED.format(reason=reason, sides=sides, error=operator.error))

    def _compare(
        self,
        problem: Linearization,
        formed: FormedProducts,
        loss: object,
        parameters: Mapping[str, Tensor],
        repeat: Callable[[], Tensor] | None,
    ) -> bool:
        graph = loss if isinstance(loss, Tensor) else None
        found = check_formed_products(problem, tuple(parameters.values()), formed, loss=graph, repeat=repeat)
        self.result = found
        if found.wrong:
            self._warn(_WRONG_PRODUCTS.format(difference=found.difference))
        elif found.asymmetric:
            self._warn(_ASYMMETRIC.format(asymmetry=found.asymmetry))
        return not (found.wrong or found.asymmetric)

    def _compare_mixed(
        self,
        formed: FormedMixed,
        loss: Tensor,
        parameters: Mapping[str, Tensor],
        repeat: Callable[[], Tensor],
        labels: Sequence[str],
    ) -> None:
        wrong = wrong_mixed(tuple(parameters.values()), formed, loss=loss, repeat=repeat)
        if wrong:
            names = ", ".join(labels[i] if i < len(labels) else f"hyperparameter {i}" for i in wrong)
            self._wrong = {labels[i] for i in wrong if i < len(labels)}
            self._told.update(label.split("/")[0] for label in self._wrong)
            self._warn(_WRONG_MIXED.format(names=names, difference=max(wrong.values())))

    def hidden(self, losses: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Refuse parameters that ``loss.backward()`` gave a gradient, though the losses' graphs do not hold them.

        Those behind torch's reentrant checkpointing are known, and need no second derivative.

        Raises:
            MisconfigurationException: It names them.
        """
        if self.in_shards or any(map(hides_layers, losses)):
            return
        seen = set().union(*(reached(loss, parameters) for loss in losses))
        lost = [
            name
            for name, p in parameters.items()
            if name not in seen and p.grad is not None and bool(p.grad.any())
        ]
        if lost:
            raise MisconfigurationException(
                f"{self.owner} needs every layer in the training loss's graph. Got {', '.join(lost[:5])}"
                f"{' and others' if len(lost) > 5 else ''}, which only loss.backward() reaches: a function that calls "
                "backward itself hides them; take it out, or checkpoint with torch.utils.checkpoint."
            )

    def negative(self, report: OuterReport) -> None:
        """Say once in a fit that a solve ended at negative curvature, and what helps."""
        if report.negative_curvature and _NEGATIVE not in self._told:
            self._told.add(_NEGATIVE)
            found = _NEGATIVE.format(curvature=report.curvature, size=abs(report.curvature))
            rank_zero_info(f"{self.owner}: {found}")

    def conclude_step(self, module: LightningModule, outer: OuterStep) -> None:
        """Tell which hyperparameters no loss of the first outer step depends on."""
        if not self.is_due:
            return
        self._checked = True
        for hyperparameter in outer.hyperparameters:
            lost = (x for x in outer.unreached if x not in self._wrong)
            labels = [x for x in lost if x.split("/")[0] == hyperparameter.name]
            if labels:
                self._told.add(hyperparameter.name)
                self._warn(_unreached(module, hyperparameter, labels))

    def conclude_fit(self, outer: OuterStep) -> None:
        """Tell which hyperparameters had a hypergradient of exactly zero in all outer steps."""
        still = [name for name in outer.unmoved if name not in self._told]
        if still:
            self._warn(
                f"The hypergradient of {', '.join(still)} was exactly zero in every outer step, so that the values are "
                "those that the run began with: the loss multiplies them by zero, or its gradient does not depend on "
                "them."
            )

    def _warn(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            rank_zero_warn(f"{self.owner}: {message}")


def reached(loss: Tensor, parameters: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the parameters that the graph of a loss holds."""
    names = {id(p): name for name, p in parameters.items()}
    return {names[id(leaf)] for leaf in graph_leaves(loss) if id(leaf) in names}


def _unreached(module: LightningModule, hyperparameter: Hyperparameter, labels: Sequence[str]) -> str:
    name, attribute = ", ".join(labels), hyperparameter.attribute
    kind, usage = type(hyperparameter).__name__, hyperparameter.shown_usage()
    start = f"No gradient reaches {kind} {name!r}, so that it stays as it is: "
    if attribute is not None and getattr(module, attribute, None) is not hyperparameter:
        got = type(getattr(module, attribute, None)).__name__
        return start + (
            f"self.{attribute} is no longer the hyperparameter. Got a {got}, "
            f"set after the fit began; set self.{attribute} = None in __init__, and nowhere else."
        )
    return start + (
        "the training loss must depend on it, differentiably. "
        f"Read it in the training step{f' as self.{attribute}' if attribute else ''}, without detach(), item() or "
        "rounding. Hard masks (DropoutRates, DropConnect) and whole numbers (Integer) have no derivative: give a "
        "temperature, or tune them by HypernetworkModule."
        f"{f' To read it:{chr(10)}{usage}' if usage else ''}"
    )
