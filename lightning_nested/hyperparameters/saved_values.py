"""What a checkpoint holds of hyperparameters: their tensors, what these mean, and their values in natural units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_nested.hyperparameters.hyperparameter import Hyperparameter
from lightning_nested.hyperparameters.vector import labelled
from lightning_nested.linalg.saved import require_keys

Placed: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]
"""Shape, dtype and device of an inner parameter."""
# 1, without a number: unconstrained tensors alone.
VERSION = 2


def saved_hyperparameters(hyperparameters: Sequence[Hyperparameter]) -> dict[str, Any]:
    """Return unconstrained tensors, kinds and natural values by name; load it with :func:`load_hyperparameters`."""
    raw = {h.name: h.state_dict() for h in hyperparameters}
    return {
        "version": VERSION,
        "hyperparameters": raw,
        "kinds": {h.name: h.kind() for h in hyperparameters},
        "values": {h.name: _once(h.values(), raw[h.name]) for h in hyperparameters},
    }


def _once(values: Mapping[str, Tensor], raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return values on the CPU; the file holds a tensor once where the value is the unconstrained tensor itself."""
    natural = {key: value.detach().cpu() for key, value in values.items()}
    return {k: raw[k] if k in raw and torch.equal(v, raw[k]) else v for k, v in natural.items()}


def load_hyperparameters(
    hyperparameters: Sequence[Hyperparameter], state: Mapping[str, Any], *, convert: bool = True
) -> tuple[list[str], list[Tensor]]:
    """Restore built hyperparameters from what :func:`saved_hyperparameters` returned.

    Args:
        hyperparameters: The hyperparameters, with the names of the state.
        state: The saved state, of this version or an earlier one.
        convert: Convert values that were saved under another range or transform; False: refuse them.

    Returns:
        Messages for the user, and the tensors whose values were converted.

    Raises:
        ValueError: A hyperparameter is of another kind, its value lies outside the range, or a later version of this
            package wrote the state.
    """
    version = state.get("version", 1)
    if version > VERSION:
        raise ValueError(
            f"The version of saved hyperparameters must be at most {VERSION}. Got {version}, written by a later "
            "lightning-nested; update it."
        )
    messages, moved = [], []
    if version < VERSION:
        messages.append(
            "The checkpoint is of an earlier version, which did not save ranges and transforms: the values are right "
            "only if those are the same as then."
        )
    else:
        for part in ("kinds", "values"):
            require_keys(state, [part], "the hyperparameters")
            require_keys(state[part], [h.name for h in hyperparameters], f"the hyperparameters' {part}")
    kinds, values = state.get("kinds", {}), state.get("values", {})
    for h in hyperparameters:
        converted = h.load_state_dict(state["hyperparameters"][h.name], kinds.get(h.name), values.get(h.name))
        if converted and not convert:
            raise ValueError(
                f"{h.name} must have the range and transform it was saved with. Got {h.transform}, and "
                f"{kinds[h.name].get('transform')} in the checkpoint: the network answers to unconstrained tensors."
            )
        if converted:
            messages.append(
                f"{h.name} was saved with {kinds[h.name].get('transform')}, another range or transform than "
                f"{h.transform}. Its values are kept, and the outer optimizer's memory of it starts again."
            )
        moved += [h.tensors[key] for key in converted]
    return messages, moved


def saved_parameters(
    saved: Mapping[str, Sequence[int]] | None, now: Mapping[str, Placed]
) -> dict[str, Placed]:
    """Return the inner parameters of a saved state, given their shapes and the parameters ``now``.

    Raises:
        ValueError: They share no name with those now, or a shape differs: it is the state of another model.
    """
    if saved is None or not now:
        return dict(now)
    shared = saved.keys() & now.keys()
    off = [name for name in shared if tuple(saved[name]) != tuple(now[name][0])]
    if off or not shared:
        names = off or list(now)[:3]
        raise ValueError(
            "The saved hyperparameters must belong to this model, whose inner optimizer moves "
            f"{ {name: tuple(now[name][0]) for name in names} }. Got a checkpoint with "
            f"{ {name: tuple(shape) for name, shape in saved.items() if name in names or not shared} }."
        )
    _, dtype, device = next(iter(now.values()))
    return {name: now.get(name, (torch.Size(shape), dtype, device)) for name, shape in saved.items()}


def saved_values(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return values in natural units, by ``name`` or ``name/key``, from the state of outer steps.

    Raises:
        ValueError: The state is of an earlier version, without values.
    """
    outer = state.get("outer", state)
    if "values" not in outer:
        raise ValueError(
            "The checkpoint must hold values in natural units. Got one of an earlier version, with unconstrained "
            "tensors alone; resume with the settings it was written with (fit with ckpt_path=...), and save again."
        )
    return {
        label: value.clone()
        for name, values in outer["values"].items()
        for label, value in labelled(name, values).items()
    }


def tuned_values(path: str | Path, *, weights_only: bool = True) -> dict[str, Tensor]:
    """Return the tuned values in a checkpoint, in natural units, by ``name`` or ``name/key``.

    Neither the module nor the callback is needed:

        values = tuned_values("last.ckpt")          # {"weight_decay/net.weight": tensor(0.0012), ...}

    Args:
        path: Checkpoint of a run with :class:`HypergradientCallback`, a :class:`NestedModule` or a
            :class:`HypernetworkModule`.
        weights_only: Load tensors and plain data only. False runs code that the file holds: for checkpoints that you
            trust, and whose other parts need it.

    Raises:
        ValueError: The checkpoint holds no tuned values.
        pickle.UnpicklingError: With ``weights_only=True``, the checkpoint holds other objects.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    found = list(_outer_states(checkpoint))
    if not found:
        raise ValueError(
            f"The checkpoint must be of a run that tunes hyperparameters. Got {str(path)!r} without any: was it "
            "written without the callback, or with save_weights_only=True?"
        )
    return {label: value for state in found for label, value in saved_values(state).items()}


def _outer_states(checkpoint: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the states of outer steps in a checkpoint: of modules, and of callbacks."""
    parts = checkpoint if isinstance(checkpoint, Mapping) else {}
    callbacks = parts.get("callbacks") or {}
    for state in (parts.get("nested"), parts.get("hypernetwork"), *callbacks.values()):
        if isinstance(state, Mapping) and "hyperparameters" in (state.get("outer") or {}):
            yield state
