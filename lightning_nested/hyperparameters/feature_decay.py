"""A decay for each input feature of a layer: features that say nothing are switched off."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nested.arguments import at_least, checked, positive
from lightning_nested.hyperparameters.transforms import Exp, Transform
from lightning_nested.hyperparameters.weights import BoundHyperparameter


@checked
class FeatureDecay(BoundHyperparameter):
    """½ Σ_j d_j ‖W_j‖² with W_j the weights that read input feature j: automatic relevance determination.

    ``feature_decay(weight)`` is the penalty, for the training loss; ``weight`` has the shape (outputs, features), as
    that of ``nn.Linear``. A large d_j says that feature j does not help on the validation data. MacKay (1994),
    "Bayesian nonlinear modeling for the prediction competition".

    Args:
        num_features: Number of input features.
        init: Initial decay of each.
        transform: Default ``Exp(lower=1e-8, upper=1e3)``.
        name: Attribute of the module that it becomes, and key in logs.

    Example:
        >>> decay = FeatureDecay(2, init=0.5)
        >>> float(decay(torch.tensor([[2.0, 0.0]])).detach())
        1.0
    """

    usage = (
        "self.feature_decay = None  # in __init__\n"
        "if self.feature_decay is not None:  # in training_step\n"
        "    loss = loss + self.feature_decay(self.network[0].weight)"
    )

    def __init__(
        self,
        num_features: int,
        init: float = 1e-3,
        transform: Transform | None = None,
        name: str = "feature_decay",
    ) -> None:
        super().__init__()
        at_least(1, num_features=num_features)
        positive(init=init)
        self.num_features, self.init, self.name = num_features, init, name
        self._use(transform or Exp(lower=1e-8, upper=1e3), init)

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"decay": torch.full((self.num_features,), self.init, dtype=dtype)}

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the penalty of a layer's weight (outputs, features), a scalar with its graph, at least float32.

        Raises:
            ValueError: The weight reads another number of features.
        """
        if weight.dim() != 2 or weight.shape[1] != self.num_features:
            raise ValueError(
                f"weight must have the shape (outputs, {self.num_features}). Got {tuple(weight.shape)}; num_features "
                "is the number of columns of the layer's weight."
            )
        decay = self.transform.forward(self.raw("decay", weight.device))
        return 0.5 * (weight.square().sum(0) @ decay.to(weight.dtype)).to(decay.dtype)
