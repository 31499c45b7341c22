"""Tensors that the user's module already has, tuned by their dotted name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nested.arguments import checked
from lightning_nested.hyperparameters.hyperparameter import Hyperparameter
from lightning_nested.hyperparameters.transforms import Unconstrained


@checked
class ModuleTensors(Hyperparameter):
    """A submodule's parameters, or one tensor, of an existing module: an augmentation network, learned images.

    The tensors stay where they are; they are trained by the outer optimizer instead of the inner one.

    Args:
        path: Dotted name: ``"augmenter"``, ``"augmenter.conv.weight"``.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.name, self.transform = path, path, Unconstrained()
        self._frozen: list[Tensor] = []  # tensors that required no gradient before attach

    def attach(self, module: nn.Module) -> None:
        """Find the tensors in ``module``."""
        found: object = module
        for part in self.path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Module):
            self.tensors = {name: p for name, p in found.named_parameters() if p.requires_grad}
        elif isinstance(found, Tensor) and found.is_leaf and found.is_floating_point():
            if not found.requires_grad:
                self._frozen.append(found.requires_grad_(True))
            self.tensors = {self.path.rsplit(".", 1)[-1]: found}
        elif found is None:
            names = [n for n, _ in module.named_modules() if n] + [n for n, _ in module.named_parameters()]
            close = difflib.get_close_matches(self.path, names, n=3, cutoff=0.4)
            raise ValueError(
                f"A hyperparameter given by name must exist in {type(module).__name__}. Got {self.path!r}; "
                f"close names: {', '.join(close) or ', '.join(names[:5])}."
            )
        if not self.tensors:
            raise ValueError(
                f"A hyperparameter given by name must be a module with parameters that require gradients, or a leaf "
                f"tensor of floating type. Got {self.path!r}, a {type(found).__name__} with none."
            )

    attach_module = attach

    def detach_module(self) -> None:
        """Freeze again what was frozen before :meth:`attach`."""
        while self._frozen:
            self._frozen.pop().requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        # Not the base's copies: copied together with their module the tensors are the copy's.
        return dict(self.__dict__)

    def reset(self) -> None:
        """Do nothing: the tensors are the module's."""

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        if not self.tensors:
            raise ValueError(f"ModuleTensors({self.path!r}) needs its module. Got none; call attach(module).")
        return self.tensors

    def _create(self, values: Mapping[str, Tensor], device: torch.device | str) -> None:
        """Create nothing: :meth:`attach` has found the tensors, which stay on the module's device."""


def as_hyperparameters(given: Hyperparameter | str | Iterable[Hyperparameter | str]) -> list[Hyperparameter]:
    """Return one or several hyperparameters as a list; a dotted name becomes :class:`ModuleTensors`."""
    several: Iterable[Any] = (
        [given] if isinstance(given, str | Hyperparameter) or not isinstance(given, Iterable) else given
    )
    return [ModuleTensors(h) if isinstance(h, str) else h for h in several]
