"""Outer steps of a run whose parameters are in shards (FSDP2): what is chosen there, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_nested.hypergradient import ConjugateGradient, Curvature, FiniteDifference, Identity, Neumann
from lightning_nested.hypergradient.evaluation_point import LookAhead
from lightning_nested.linalg.shards import is_shard
from lightning_nested.trainer.lightning import tensor_parallel_size

if TYPE_CHECKING:
    from lightning_nested.trainer.outer_loop import OuterLoop
    from lightning_nested.trainer.outer_plan import OuterPlan

_SOLVERS = (Identity, Neumann, ConjugateGradient)
_WHO = "HypergradientCallback under ModelParallelStrategy"


def shards_parameters(trainer: Trainer) -> bool:
    """Return True under Lightning's strategy for FSDP2."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def gather_anew(module: nn.Module) -> None:
    """Let the coming forward pass gather all parameters from their shards, which may have moved.

    ``fully_shard`` keeps those of the outermost module after a forward pass.
    """
    for each in module.modules():
        reshard = getattr(each, "reshard", None)
        if callable(reshard) and hasattr(each, "set_reshard_after_forward"):
            reshard()


@contextmanager
def gathered_after(trainer: Trainer, module: nn.Module) -> Iterator[None]:
    """Let the forward and backward passes after the exit gather parameters that have moved inside."""
    try:
        yield
    finally:
        if shards_parameters(trainer):
            gather_anew(module)


def curvature_of_run(
    trainer: Trainer, plan: OuterPlan, loop: OuterLoop, curvature: Curvature | None
) -> Curvature | None:
    """Return the curvature of a run: the given one, or differences where parameters are in shards.

    There :func:`check_choices` refuses what needs whole parameters or second derivatives, and the self-check looks at
    no products.

    Raises:
        MisconfigurationException: With a cure.
    """
    loop.check.in_shards = shards_parameters(trainer)
    if not loop.check.in_shards:
        return curvature
    check_choices(trainer, plan, loop, curvature)
    if curvature is None:
        rank_zero_info(
            f"{_WHO}: the parameters are in shards, so products with the curvature are differences of gradients, and "
            f"the outer loss is differentiated at the current weights, by {type(plan.solver).__name__}. While the "
            "training still lowers its loss, less decay looks better there: a long warmup_steps helps."
        )
    return curvature if curvature is not None else FiniteDifference()


def check_choices(trainer: Trainer, plan: OuterPlan, loop: OuterLoop, curvature: Curvature | None) -> None:
    """Refuse what cannot be had where parameters are in shards.

    Raises:
        MisconfigurationException: With a cure.
    """
    from torch.distributed import fsdp

    outer, solver, size = plan.outer, plan.solver, tensor_parallel_size(trainer)
    each = [d.name for d in outer.decays if d.per == "parameter"]
    sharded = [h.name for h in outer.hyperparameters if any(map(is_shard, h.tensors.values()))]
    if not hasattr(fsdp, "fully_shard"):
        cause, cure = f"needs torch 2.6 or later. Got torch {torch.__version__}", "install a later one"
    elif size > 1:
        cause, cure = f"needs data-parallel shards. Got tensor_parallel_size={size}", "set it to 1"
    elif not isinstance(curvature, FiniteDifference | None):
        cause = f"takes products by differences of gradients. Got curvature={curvature!r}"
        cure = "leave it out, or give FiniteDifference()"
    elif isinstance(plan.point, LookAhead):
        cause = f"differentiates the outer loss at the current weights. Got at={plan.point!r}"
        cure = "leave it out, or give Current()"
    elif not isinstance(solver, _SOLVERS) or getattr(solver, "preconditioner", None) is not None:
        cause = f"solves by sums over shards. Got solver={solver!r}, which needs whole vectors or layers"
        cure = "give Neumann(), Identity() or ConjugateGradient() without a preconditioner"
    elif each:
        cause = f'tunes decays that every process holds whole. Got WeightDecay(per="parameter") {each}'
        cure = 'give per="tensor" or per="model"'
    elif sharded:
        cause = f"tunes tensors that every process holds whole. Got {sharded} in shards"
        cure = "keep them out of the modules that fully_shard wraps, by its ignored_params"
    elif loop.restart_every is not None:
        cause, cure = (
            f"cannot initialize shards again. Got restart_every={loop.restart_every}",
            "leave it out",
        )
    elif loop.train_batches.wanted:
        cause = f"takes mixed derivatives on the training step's batch. Got train_batches={loop.train_batches.wanted}"
        cure = "set it to 0"
    else:
        return
    raise MisconfigurationException(f"{_WHO} {cause}; {cure}.")


def check_shards(parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are not all sharded over the same processes.

    Raises:
        MisconfigurationException: With a cure.
    """
    whole = [name for name, p in parameters.items() if not is_shard(p)]
    if whole:
        raise MisconfigurationException(
            f"{_WHO} needs every parameter of the inner optimizer in shards. Got {', '.join(whole[:5])}"
            f"{' and others' if len(whole) > 5 else ''} whole, whose gradients no process would average; call "
            "torch.distributed.fsdp.fully_shard on a module around them in configure_model, or freeze them."
        )
    sharded = [p for p in parameters.values() if is_shard(p)]
    layouts = {(p.device_mesh, tuple(each.is_shard() for each in p.placements)) for p in sharded}
    if len(layouts) > 1:
        raise MisconfigurationException(
            f"{_WHO} needs all parameters in shards over the same processes. Got {len(layouts)} layouts; give "
            "fully_shard the same mesh everywhere."
        )
