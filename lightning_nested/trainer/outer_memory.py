"""What outer steps hold in memory beside the training, from sizes that are known before the first one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_debug, rank_zero_info
from torch import Tensor, nn

from lightning_nested.hypergradient import Curvature
from lightning_nested.hyperparameters.shared_adam import SharedAdam
from lightning_nested.linalg.graph import graph_bytes
from lightning_nested.linalg.shards import parts
from lightning_nested.trainer.inner_graph import InnerGraph
from lightning_nested.trainer.outer_plan import OuterPlan, needs_graph


def outer_memory(plan: OuterPlan, parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the bytes that outer steps hold, by what they are of; :meth:`OuterPlan.attach` must have run.

    Not counted are the graphs of the two losses, and copies that are freed at once. A layer that ``torch.compile``
    hides has no factors; it is counted as if it had.

    Args:
        plan: Plan of the run.
        parameters: Inner parameters by name; empty while the shape of a lazy one is not known.
    """
    tensors, forecast = tuple(parts(tuple(parameters.values()))), plan.forecast
    if not tensors:
        return {}
    found = {"Kronecker factors": 0, "curvature per weight": 0, "mean gradient": 0}
    if forecast is not None:
        # Factors and their inverses; squares and those with damping.
        factors, diagonals = forecast.fisher.sizes()
        found["Kronecker factors"], found["curvature per weight"] = 2 * factors, 2 * diagonals
        found["mean gradient"] = _bytes(tensors)
    width = max(p.element_size() for p in tensors)
    found["solver"] = plan.solver.held(sum(p.numel() for p in tensors)) * width
    # By each tuned option, of the weights and at most two buffers.
    options = sum(t.numel() for option in plan.outer.options for t in option.tensors.values())
    if options:
        found["derivatives by options"] = 3 * options * _bytes(tensors)
    # Adam has two means beside the values; SharedAdam also the gradient before.
    copies = 4 if isinstance(plan.outer.optimizer, SharedAdam) else 3
    name = "decays" if len(plan.outer.decays) == len(plan.outer.hyperparameters) else "hyperparameters"
    found[name] = copies * _bytes(plan.outer.tensors)
    return found


def tell_plan(
    owner: str,
    trainer: Trainer,
    plan: OuterPlan,
    parameters: Mapping[str, Tensor],
    curvature: Curvature | None,
) -> None:
    """Say at the start of a fit what outer steps cost and hold, or that there will be none.

    Args:
        owner: Class name in the message.
        trainer: Trainer of the run. A ``fast_dev_run`` makes one outer step in any case.
        plan: Plan of the run.
        parameters: Inner parameters by name.
        curvature: Curvature of the run; None: the Hessian.
    """
    pace, batches = plan.pace, trainer.accumulate_grad_batches
    line = f"{owner}: {pace}{memory_line(outer_memory(plan, parameters))}."
    if batches > 1 and needs_graph(plan, curvature):
        line += (
            f" Each outer step also keeps the graphs of all {batches} accumulated batches up to the last one, for "
            "second derivatives: FiniteDifference() keeps none."
        )
    # As benchmarks/products.py measured; cuDNN has no second derivative, and differences are taken there anyhow.
    slow = trainer.strategy.root_device.type == "cpu" and any(
        isinstance(m, nn.LSTM) and any(p.requires_grad for p in m.parameters())
        for m in trainer.lightning_module.modules()
    )
    if slow and plan.solver.needs_operator and curvature is None:
        line += (
            " The network has an nn.LSTM, whose exact products cost about four gradients each: "
            "curvature=FiniteDifference() forms them for little more than one, right to about 0.001."
        )
    try_out = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
    if pace is not None and pace.outer_steps == 0 and not try_out:
        line += (
            f" The run has {pace.total_steps} inner steps, so that nothing will be tuned: lower "
            f"warmup_steps={pace.warmup_steps} or every_n_steps={pace.every_n_steps}, or train longer."
        )
    rank_zero_info(line)


def tell_graphs(owner: str, trainer: Trainer, plan: OuterPlan, graph: InnerGraph, loss: Tensor) -> None:
    """Say once in a fit what the graphs hold that an outer step keeps, measured on the loss of the first batch.

    Args:
        owner: Class name in the message.
        trainer: Trainer of the run.
        plan: Plan of the run.
        graph: Graphs of its outer steps.
        loss: Loss of a batch with its graph.
    """
    batches = trainer.accumulate_grad_batches
    if graph.measured:
        return
    graph.measured = True
    if batches == 1 or not needs_graph(plan, graph.curvature_in_use):
        return
    module = trainer.lightning_module
    try:
        found = graph_bytes(loss, [*module.parameters(), *module.buffers(), *plan.outer.tensors])
    except RuntimeError as error:
        # Of memory that is freed already, or a kind of tensor without any: no reason to end a fit.
        rank_zero_debug(f"{owner}: the memory of graphs is not known: {error}")
        return
    if found:
        rank_zero_info(
            f"{owner}: the activations that the first batch keeps for derivatives take {_sized(found)}, so those of "
            f"the {batches} batches of an outer step about {_sized(batches * found)}; FiniteDifference() keeps none."
        )


def memory_line(parts: Mapping[str, int]) -> str:
    """Describe memory by its parts, largest first, after a semicolon; parts below a hundredth are left out.

    >>> memory_line({"Kronecker factors": 8_100_000, "mean gradient": 2_000_000, "decays": 400})
    '; holds 10 MB: Kronecker factors 8.1, mean gradient 2'
    """
    total = sum(parts.values())
    if not total:
        return ""
    size, _ = _unit(total)
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {_short(n / size)}" for name, n in ordered if n > 0.01 * total)
    return f"; holds {_sized(total)}" + (f": {shown}" if shown else "")


_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def _unit(total: int) -> tuple[int, str]:
    return next(((s, u) for s, u in _UNITS if total >= s), _UNITS[-1])


def _sized(total: int) -> str:
    size, unit = _unit(total)
    return f"{_short(total / size)} {unit}"


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
