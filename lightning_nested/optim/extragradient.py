"""Extragradient and its one-gradient form, extrapolation from the past.

Korpelevich (1976), Ekonomika i Mat. Metody 12:747-756; Popov (1980), Math. Notes 28:845-848;
Gidel, Berard, Vignoud, Vincent & Lacoste-Julien (2019), ICLR.
"""

from __future__ import annotations

from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from lightning_nested.optim.base import Closure, PlainOptimizer, evaluated
from lightning_nested.optim.kernels.walk import Tensors, add_scaled, walk


class Extragradient(PlainOptimizer):
    """w′ ← w − lr·g(w), then w ← w − lr·g(w′): look ahead, then step from the saved point.

    Two gradients an update. In a game every player looks ahead before any player steps::

        backward(); for o in optimizers: o.extrapolate()
        backward(); for o in optimizers: o.step()

    For one loss, ``step(closure)`` does both. The closure clears the gradients, as closures in torch do; gradients
    accumulated over several batches are refused, because the second gradient would be of the last batch alone. On the
    bilinear game the rate is √(1 − lr² + lr⁴).

    The saved w is in the state between the two halves only, so that a checkpoint between updates holds nothing. Its
    memory, one number per parameter, is kept for the next update.

    Args:
        params: Parameters or groups; each group may have its own options.
        lr: Learning rate α of both halves.
        weight_decay: λ of a penalty ½λ‖w‖², whose gradient λw is added to g (coupled).
        maximize: Ascend. As in torch, weight decay still decays.

    Korpelevich (1976), Ekonomika i Mat. Metody 12:747-756.

    >>> w = torch.tensor([1.0], requires_grad=True)
    >>> optimizer = Extragradient([w], lr=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (w**2 / 2).sum()
    ...     loss.backward()
    ...     return loss.item()
    >>> optimizer.step(closure)  # returns the loss before the update
    0.5
    >>> round(w.item(), 6)  # 1 − lr + lr²
    0.91
    """

    num_gradients: ClassVar[int] = 2

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as every optimizer does; between the two halves, they are stepped from where they are."""
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("extrapolated", False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("extrapolated", False)
        self.__dict__.pop("_room", None)  # a copy, or a loaded state, shares no memory with what it came from

    @torch.no_grad()
    def extrapolate(self, closure: Closure | None = None) -> float | None:
        """Save w and move to w − lr·g.

        Args:
            closure: Recomputes the gradients and returns the loss.

        Raises:
            RuntimeError: The parameters are extrapolated already, or the closure adds to earlier gradients.
        """
        if self.is_extrapolated:
            raise RuntimeError(
                "extrapolate() needs parameters that are not extrapolated. Got a second call; recompute the gradients "
                "and call step()."
            )
        loss = self._evaluated(closure)
        self._update_groups(self._look_ahead, 1)
        for group in self.param_groups:
            group["extrapolated"] = True
        return loss

    @property
    def is_extrapolated(self) -> bool:
        """True between ``extrapolate`` and ``step``."""
        return any(group.get("extrapolated", False) for group in self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Closure) -> float: ...

    def step(self, closure: Closure | None = None) -> float | None:
        """Set w to w_saved − lr·g with the gradients at the extrapolated point.

        A parameter without a gradient there gets its saved value back; one that had none before is stepped from its
        current value. Without a closure and without ``extrapolate``, a step that moves nothing is accepted: gradients
        or learning rates of zero, by which ``torch.distributed.checkpoint`` lets an optimizer make its state.

        Args:
            closure: Recomputes the gradients and returns the loss. It is called before and after the extrapolation;
                only after it if ``extrapolate`` has been called.

        Returns:
            The loss of the closure's first call; None without one.

        Raises:
            RuntimeError: There is no closure, and ``extrapolate`` was not called; or the closure adds to earlier
                gradients.
        """
        loss, own = None, not self.is_extrapolated
        if own:
            if closure is None:
                if self._moves_nothing():
                    return None
                raise RuntimeError(
                    "step() needs extrapolated parameters. Got neither a call of extrapolate() nor a closure; call "
                    "extrapolate(), recompute the gradients, then step(); or give step() a closure."
                )
            loss = self.extrapolate(closure)
            self.zero_grad()  # for a closure that leaves it to its caller, who can clear the first gradients only
        try:
            second = self._evaluated(closure)
            super().step()
        except BaseException:
            if own:
                self._return()  # as if the step had never begun
            raise
        self._return()
        return loss if own else second

    def _moves_nothing(self) -> bool:
        """Return True if ±g + λw, or the learning rate, is 0 for every parameter that has a gradient."""
        for group, options in zip(self.param_groups, self._checked(), strict=True):
            sign, decay = -1 if options["maximize"] else 1, options["weight_decay"]
            for p in group["params"] if options["lr"] else ():
                if p.grad is not None and bool((sign * p.grad + decay * p.detach()).any()):
                    return False
        return True

    def _evaluated(self, closure: Closure | None) -> float | None:
        """Return the closure's loss; refuse a closure that adds to the gradients that are there.

        The smallest gradient tells: backward has then added to the same tensor, which nothing else has changed.
        """
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if closure is None or not held or torch.compiler.is_compiling():
            return evaluated(closure)
        smallest = min(held, key=Tensor.numel)
        before, version = smallest.grad, smallest.grad._version
        added: list[bool] = []

        def first(p: Tensor) -> None:
            handle.remove()
            added.append(p.grad is before and p.grad._version == version + 1)

        handle = smallest.register_post_accumulate_grad_hook(first)
        try:
            loss = evaluated(closure)
        finally:
            handle.remove()
        if any(added):
            raise RuntimeError(
                "The closure of Extragradient must clear the gradients before its backward pass. Got one that adds to "
                "gradients that are there, as the Trainer's does with accumulate_grad_batches > 1: the second gradient "
                "would be of the last batch alone. Set accumulate_grad_batches=1 and make batches larger, use "
                "ExtrapolationFromThePast, or call zero_grad() in the closure."
            )
        return loss

    def _look_ahead(self, options: dict[str, Any], *columns: list[Any]) -> None:
        def many(ws: Tensors, es: Tensors, anchors: Tensors) -> None:
            torch._foreach_copy_(anchors, ws)
            add_scaled(ws, es, -options["lr"])

        walk(many, *columns, options=options)
        for p, anchor in zip(columns[0], columns[2], strict=True):
            self.state[p]["anchor"] = anchor

    def _update(self, options: dict[str, Any], *columns: list[Any]) -> None:
        # walk takes the decay's gradient from w before the update: it belongs to the extrapolated point
        anchors = [self.state[p].pop("anchor", p) for p in columns[0]]
        lr = options["lr"]

        def one(w: Tensor, e: Tensor, anchor: Tensor) -> None:
            torch.add(anchor, e, alpha=-lr, out=w)

        def many(ws: Tensors, es: Tensors, anchors: Tensors) -> None:
            torch._foreach_copy_(ws, anchors)
            add_scaled(ws, es, -lr)

        walk(many, *columns, anchors, options=options, one=one)

    def _init_group(self, group: dict[str, Any], *columns: list[Any]) -> None:
        super()._init_group(group, *columns[:2])
        for rooms in columns[2:]:
            rooms += [self._room_for(p) for p in columns[0]]

    def _room_for(self, p: Tensor) -> Tensor:
        """Return memory for the copy of a parameter, kept between updates: new pages cost more than the copy itself."""
        rooms: dict[Tensor, Tensor] = self.__dict__.setdefault("_room", {})
        room = rooms.get(p)
        if room is None or any(
            getattr(room, name) != getattr(p, name) for name in ("shape", "dtype", "device", "layout")
        ):
            room = rooms[p] = torch.empty_like(p, memory_format=torch.preserve_format)
        return room

    @torch.no_grad()
    def _return(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "anchor" in self.state.get(p, {}):
                    p.copy_(self.state[p].pop("anchor"))
                if not self.state.get(p, True):
                    del self.state[p]
            group["extrapolated"] = False


class ExtrapolationFromThePast(PlainOptimizer):
    """w′ ← w − lr·g(w′₋), w ← w − lr·g(w′): extragradient that looks ahead with the previous gradient.

    One gradient an update. The parameters hold w′, where gradients are taken; ``anchor`` in the state holds w. With a
    constant learning rate w′ goes through the iterates of :class:`OptimisticSGD`.

    Args:
        params: Parameters or groups; each group may have its own options.
        lr: Learning rate α of both halves.
        weight_decay: λ of a penalty ½λ‖w‖², whose gradient λw′ is added to g (coupled).
        maximize: Ascend. As in torch, weight decay still decays.

    Popov (1980), Math. Notes 28:845-848; Gidel, Berard, Vignoud, Vincent & Lacoste-Julien (2019), ICLR.

    >>> w = torch.tensor([1.0], requires_grad=True)
    >>> optimizer = ExtrapolationFromThePast([w], lr=0.1)
    >>> w.grad = w.detach().clone()
    >>> optimizer.step()
    >>> round(w.item(), 6), round(optimizer.state[w]["anchor"].item(), 6)
    (0.8, 0.9)
    """

    slots = ("anchor",)

    def _update(self, options: dict[str, Any], *columns: list[Any]) -> None:
        lr = options["lr"]

        def one(w: Tensor, e: Tensor, anchor: Tensor) -> None:
            anchor.add_(e, alpha=-lr)
            torch.add(anchor, e, alpha=-lr, out=w)

        def many(ws: Tensors, es: Tensors, anchors: Tensors) -> None:
            add_scaled(anchors, es, -lr)
            torch._foreach_copy_(ws, anchors)
            add_scaled(ws, es, -lr)

        walk(many, *columns, options=options, one=one)

    def _begin(self, name: str, p: Tensor, group: dict[str, Any]) -> Tensor:
        return p.detach().clone(memory_format=torch.preserve_format)
