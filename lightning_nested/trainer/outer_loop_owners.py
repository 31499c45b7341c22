"""Bases of the classes that run an outer loop: its counters and options as attributes, tuned values, their export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_nested.files import replace_text
from lightning_nested.hyperparameters import OuterReport
from lightning_nested.hyperparameters.saved_values import saved_values
from lightning_nested.trainer.notebook import html_table
from lightning_nested.trainer.outer_loop import OuterLoop
from lightning_nested.trainer.use import OneFitCallback

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class OfLoop:
    """Attribute of an owner that its outer loop holds; not a property, which TorchScript would compile."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else getattr(instance.outer_loop, self._name)

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance.outer_loop, self._name, value)


class HasOuterLoop:
    """Counters of an :class:`OuterLoop`, and values, as attributes of the class that runs it."""

    # TorchScript would read annotations of the class.
    if TYPE_CHECKING:
        outer_loop: OuterLoop
        inner_steps: int
        outer_steps: int
        skipped_steps: int
        last_report: OuterReport | None
    else:
        inner_steps, outer_steps, skipped_steps, last_report = OfLoop(), OfLoop(), OfLoop(), OfLoop()

    def values(self) -> dict[str, Tensor]:
        """Return tuned values in natural units, by ``name`` or ``name/key``.

        Available from the start of ``fit``, or once a checkpoint has been loaded. A strategy that forks or spawns
        processes trains a copy of the object: there, read them in a hook, or from a checkpoint by
        :func:`tuned_values`.

        Raises:
            ValueError: The checkpoint that was loaded is of an earlier version, without values.
        """
        saved = getattr(self, "_saved", None)
        return saved_values(saved) if saved else self.outer_loop.outer.values()

    def export_values(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return :meth:`values` as plain numbers and lists, and write them to a file if a path is given.

        Args:
            path: File that ends with ``.json``, ``.yaml`` or ``.yml``; process 0 writes it. Folders are made.

        Raises:
            ValueError: There are no values yet, or the file's name ends otherwise.
        """
        numbers = {label: value.tolist() for label, value in self.values().items()}
        if not numbers:
            raise ValueError(
                f"There must be values to export. Got none from {type(self).__name__}; call it once fit has begun, or "
                "load a checkpoint first."
            )
        if path is not None:
            write_values(Path(path), numbers)
        return numbers

    def export(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return values as plain numbers and lists, and write them to a file; see :meth:`export_values`."""
        return self.export_values(path)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw tuned values against outer steps; the band goes from the smallest to the largest where there are many.

        Drawn are the outer steps that were logged, and the current values.

        Args:
            ax: Axes to draw in; None: those of a new figure, without a window.

        Returns:
            The axes; ``plot().figure.savefig("values.png")`` writes them.

        Raises:
            ValueError: There was no outer step yet.
            MissingExtraError: matplotlib is not installed.
        """
        from lightning_nested.figures.tuning import plot_values

        loop = self.outer_loop
        return plot_values(loop.trace, loop.outer_steps, loop.spreads(), loop.outer.first, ax)

    def on_fit_end(self, *_: Any, **__: Any) -> None:
        """Report what was tuned, on process 0."""
        rank_zero_info(self.outer_loop.summary())


def state_of_outer_steps(checkpoint: Mapping[str, Any], key: str, owner: str) -> Mapping[str, Any] | None:
    """Return a module's part of a checkpoint; warn where it lacks, so that hyperparameters start again."""
    state: Mapping[str, Any] | None = checkpoint.get(key)
    if state is None:
        rank_zero_warn(
            f"The checkpoint must hold tuned values of {owner}. Got none: hyperparameters start from their initial "
            "values. Was it written by another module, or before fit began?"
        )
    return state


@rank_zero_only
def write_values(path: Path, numbers: Mapping[str, Any]) -> None:
    """Write numbers by name as JSON or YAML, as the file's name ends; a reader never sees half of a file."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"path must end with .json, .yaml or .yml. Got {str(path)!r}.")
    if path.suffix == ".json":
        text = json.dumps(dict(numbers), indent=2) + "\n"
    else:
        text = yaml.safe_dump(dict(numbers), sort_keys=False)
    replace_text(path, text)


class OuterLoopCallback(HasOuterLoop, OneFitCallback):
    """Base of callbacks that run an outer loop."""

    def _repr_html_(self) -> str:
        """Return the object as it is constructed and, once fit has begun, a table of its values, for notebooks."""
        head = f"<pre>{escape(repr(self))}</pre>"
        now = self.outer_loop.spreads()
        if not now:
            return head
        titles = ("hyperparameter", "values", "start", "mean", "smallest", "largest")
        rows = [
            (name, count, self.outer_loop.outer.first.get(name, [mean])[0], mean, low, high)
            for name, (mean, low, high, count) in now.items()
        ]
        steps = f"{self.outer_steps} outer steps, {self.skipped_steps} skipped"
        return head + html_table(titles, rows, steps)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load a state saved under another key, as with other hyperparameters, or in another order.

        Lightning would go on without it. Loaded, it is restored by name, or refused.
        """
        states = checkpoint.get("callbacks", {})
        found = [state for state in states.values() if isinstance(state, dict) and "outer" in state]
        if self.state_key not in states and found:
            self.load_state_dict(found[0])
