"""Valid arguments of every public class and function, and what each argument may be."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import lightning_nested as ln
from lightning_nested.callbacks import ClassifierEvaluator, ModuleEvaluator, ScoreOptions
from lightning_nested.games import Multipliers
from lightning_nested.hypergradient import Minimize
from lightning_nested.hyperparameters import Exp, Interval
from lightning_nested.modules import (
    R2,
    BigGANNetworks,
    BigGANObjective,
    DiffAugment,
    Execution,
    GradientPenalty,
    Hinge,
    Implicit,
    LoopOptions,
    Sampling,
    Unrolled,
)
from lightning_nested.networks import MLP, AugmentationNetwork, CIFARAlexNet, CIFARResNet, SmallCNN

TEXT = "some text"  # for an argument that takes any string
ANY = object()  # for an argument that takes any object, or whose kinds its own tests look at

# What results hold is not an argument of a user's.
RESULTS = {"LyapunovSpectrum"}
# A file is: tests/hyperparameters/test_saved_values.py has some.
READERS = {"tuned_values"}

w, h = torch.ones(2, requires_grad=True), torch.tensor(0.5, requires_grad=True)
parameters = [nn.Parameter(torch.ones(2))]
line = nn.Linear(2, 1)
linearized = ln.Hessian().linearize((w**4).sum(), (w,))
sgd = partial(torch.optim.SGD, lr=0.1)
step_scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=3)
point = (torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64))
eigenvalues = torch.tensor([1j, -1j], dtype=torch.complex128)
generator = torch.Generator()


def inner(params: Any, hparams: Any) -> torch.Tensor:
    return 0.5 * (params[0] ** 2).sum() + (hparams[0] * params[0]).sum()


def outer(params: Any, hparams: Any) -> torch.Tensor:
    return (params[0] ** 2).sum()


def one_step(params: Any, hparams: Any, t: int) -> Any:
    return tuple(p - 0.1 * (p + hparams[0]) for p in params)


def product(players: Any) -> Any:
    loss = (players[0] * players[1]).sum()
    return loss, -loss


def squared(params: Any) -> torch.Tensor:
    return (params[0] ** 2).sum()


def scaled(state: torch.Tensor) -> torch.Tensor:
    return 0.5 * state


class Small(ln.NestedModule):
    def inner_loss(self, batch: Any) -> Any: ...


class SmallConstrained(ln.AugmentedLagrangian):
    def constrained_loss(self, batch: Any) -> Any: ...


class SmallGame(ln.GameModule):
    def players(self) -> Any:
        return {}

    def player_loss(self, name: str, batch: Any) -> Any: ...


Also = dict[str, tuple[Any, ...]]


class Case:
    """A target, what each call needs, and further kinds that an argument may be of beside its default's."""

    def __init__(self, target: Callable[..., Any], also: Also | None = None, **required: Any) -> None:
        self.target, self.required = target, required
        signature = inspect.signature(target)
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        defaults = {n: p.default for n, p in signature.parameters.items() if p.kind not in kinds}
        self.examples = {
            n: (*((v,) if v is not inspect.Parameter.empty else ()), *(also or {}).get(n, ()))
            for n, v in {**defaults, **required}.items()
        }
        for n, v in required.items():
            if v not in self.examples[n] if not isinstance(v, torch.Tensor) else False:
                self.examples[n] = (v, *self.examples[n])

    def __call__(self, **replaced: Any) -> Any:
        return self.target(**{**self.required, **replaced})


_named: Also = {"name": (TEXT,)}
_transform: Also = {"transform": (Exp(),)}
_optimizers: Also = {"params": (parameters, parameters[0]), "lr": (torch.tensor(0.1),)}
_schedules: Also = dict.fromkeys(
    ("inner_scheduler", "outer_scheduler", "weights_scheduler", "response_scheduler", "scheduler"),
    (step_scheduler,),
)
_data: dict[str, Any] = {
    "train_size": 20, "val_size": 5, "wrong_label_fraction": 0.1, "use_clean_labels": False, "with_index": False,
    "batch_size": 4, "val_batch_size": None, "seed": 0, "num_workers": 0, "drop_last": False, "imbalance": 1.0,
}  # fmt: skip
_data_kinds: Also = {"val_batch_size": (3,), "seed": (None,)}
_text: dict[str, Any] = {
    "length": 4, "vocabulary_size": 20, "batch_size": 4, "val_batch_size": None, "val_fraction": 0.1,
    "test_fraction": 0.1, "train_tokens": None, "seed": 0,
}  # fmt: skip
_text_kinds: Also = _data_kinds | {"train_tokens": (100,)}
_hyper = {"num_hyperparameters": 2}
_conv: dict[str, Any] = {"in_channels": 1, "out_channels": 2, "kernel_size": 3}
_response: Also = {"loop": (ln.STN(),)}
_solvers: Also = {"solver": (ANY,), "curvature": (ANY,), "reduce": (sgd,)}
_loss: dict[str, Any] = {"losses": product, "players": point}
_rates: dict[str, Any] = {"eigenvalues": eigenvalues, "lr": 0.1}

_anneal = ln.Anneal(0.1, 0.2, 3)

CASES = {
    # callbacks
    "AnnealOptimizer": Case(ln.AnnealOptimizer, {"option": (TEXT,), "player": (TEXT,)}, anneal=_anneal),
    "GameSpectrumCallback": Case(ln.GameSpectrumCallback, {"k": (None,)}),
    "GenerativeMetrics": Case(ln.GenerativeMetrics, {"cache": (TEXT,)}),
    "GeneratorEMA": Case(ln.GeneratorEMA, {"module": (TEXT,), "decay": (_anneal,)}),
    "HypergradientCallback": Case(
        ln.HypergradientCallback,
        {"hyperparameters": (TEXT, [ln.WeightDecay()], [TEXT]), "solver": (ln.Neumann(),), "optimizer": (sgd,)}
        | dict.fromkeys(("every_n_steps", "warmup_steps", "restart_every"), (3,))
        | {"curvature": (ln.Hessian(),), "outer_dataloader": (ANY,), **_schedules},
        hyperparameters=ln.WeightDecay(),
    ),
    "Lookahead": Case(ln.Lookahead),
    "LyapunovCallback": Case(ln.LyapunovCallback, {"rule": (ANY,)}),
    "ReproducibilityCheck": Case(ln.ReproducibilityCheck),
    "RetrainCheck": Case(ln.RetrainCheck, {"monitor": (TEXT,)}),
    "SampleGrid": Case(ln.SampleGrid),
    "ClassifierEvaluator": Case(ClassifierEvaluator),
    "ModuleEvaluator": Case(ModuleEvaluator, module=nn.Linear(2, 2), label=TEXT),
    "ScoreOptions": Case(ScoreOptions),
    # datamodules
    "CIFAR10DataModule": Case(ln.CIFAR10DataModule, _data_kinds, **_data),
    "DigitsDataModule": Case(ln.DigitsDataModule, _data_kinds, **_data),
    "ExperienceDataModule": Case(ln.ExperienceDataModule, {"options": ({"max_episode_steps": 9},)}),
    "FashionMNISTDataModule": Case(ln.FashionMNISTDataModule, _data_kinds, **_data),
    "MNISTDataModule": Case(ln.MNISTDataModule, _data_kinds, **_data),
    "PennTreebankDataModule": Case(ln.PennTreebankDataModule, _text_kinds | {"folder": (TEXT,)}, **_text),
    "PydocTextDataModule": Case(ln.PydocTextDataModule, _text_kinds, **_text),
    "StepsDataModule": Case(ln.StepsDataModule),
    "TabularDataModule": Case(ln.TabularDataModule, {"seed": (None,), "target": (TEXT,)}),
    "TextSourcesDataModule": Case(
        ln.TextSourcesDataModule, _text_kinds | {"target_tokens": (100,), "epoch_rows": (100,)}, **_text
    ),
    "MixtureOfGaussiansDataModule": Case(ln.MixtureOfGaussiansDataModule),
    # demos
    "AugmentationReport": Case(ln.AugmentationReport, _named),
    "DistillationReport": Case(ln.DistillationReport, _named),
    "GameReport": Case(ln.GameReport, _named),
    "HeatEquation": Case(ln.HeatEquation, _schedules),
    "ReturnReport": Case(ln.ReturnReport, _named),
    "ScheduleReport": Case(ln.ScheduleReport, _named),
    "TuningReport": Case(ln.TuningReport, _named),
    "MixtureReport": Case(ln.MixtureReport, _named | {"monitor": (TEXT,), "every_n_steps": (3,)}),
    "ModeCoverage": Case(ln.ModeCoverage, _named),
    "ZooGame": Case(
        ln.ZooGame, {"start": ([[-1.0], [2.0]],), "solution": ([[-1.0], [2.0]],)}, game=ln.DiracGAN()
    ),
    # dynamics
    "GeneralizedRidgeRider": Case(ln.GeneralizedRidgeRider, dict.fromkeys(("branching", "executor"), (ANY,))),
    "RidgeRider": Case(ln.RidgeRider),
    "kaplan_yorke_dimension": Case(ln.kaplan_yorke_dimension, exponents=torch.tensor([0.5, -1.0])),
    "lyapunov_exponents": Case(
        ln.lyapunov_exponents, {"frame": (ANY,), "generator": (None,)}, step=scaled, x0=w.detach(), k=1, num_steps=2,
        orthonormalize_every=1, batched=False, window="uniform", generator=generator, compile=False,
    ),
    "lyapunov_spectrum": Case(
        ln.lyapunov_spectrum, {"burn_out": (1,), "k": (None,), "generator": (None,)},
        step=scaled, x0=w.detach(), k=1, num_steps=2,
        orthonormalize_every=1, batched=False, window="uniform", generator=generator, compile=False,
    ),
    "rk4_step": Case(ln.rk4_step, {"dt": (-0.1,)}, field=scaled, dt=0.1),
    "update_map": Case(
        ln.update_map, {"rule": (ANY,), "optimizer": ([sgd(parameters)],)}, optimizer=sgd(parameters), loss=squared
    ),
    # games
    "Bilinear": Case(ln.Bilinear, {"matrix": (torch.eye(2),)}),
    "ConstrainedLoss": Case(
        ln.ConstrainedLoss, dict.fromkeys(("inequalities", "equalities"), (torch.ones(2),)), loss=torch.tensor(1.0)
    ),
    "Multipliers": Case(Multipliers, {"dtype": (torch.float64,)}, num_inequalities=2),
    "augmented_lagrangian": Case(
        ln.augmented_lagrangian, problem=ln.ConstrainedLoss(loss=torch.tensor(1.0), inequalities=torch.ones(2)),
        multipliers=Multipliers(2), penalty=1.0,
    ),
    "DiracGAN": Case(ln.DiracGAN),
    "GaussiansGAN": Case(ln.GaussiansGAN, {"generator": (generator,)}),
    "IteratedPrisonersDilemma": Case(ln.IteratedPrisonersDilemma),
    "MatchingPennies": Case(ln.MatchingPennies),
    "PenniesAndDilemma": Case(ln.PenniesAndDilemma, {"dilemma": (ln.SmallIPD(),)}),
    "QuadraticGame": Case(ln.QuadraticGame, first=torch.eye(2), coupling=torch.eye(2), second=torch.eye(2)),
    "RandomSubspace": Case(ln.RandomSubspace, {"generator": (generator,)}, game=ln.DiracGAN()),
    "SmallIPD": Case(ln.SmallIPD),
    "convergence_rate": Case(ln.convergence_rate, {"eigenvalues": ([1j],), "phase": (-0.1, h), "lr": (h,)},
        **_rates, momentum=0.5),
    "game_jacobian": Case(ln.game_jacobian, {"reduce": (sgd,)}, **_loss),
    "game_spectrum": Case(
        ln.game_spectrum, {"k": (1,), "player": (0,), "tolerance": (1e-3,), "reduce": (sgd,)}, **_loss
    ),
    "joint_gradient": Case(ln.joint_gradient, {"reduce": (sgd,)}, **_loss),
    "modes_covered": Case(ln.modes_covered, samples=torch.zeros(3, 2), centres=torch.eye(2), std=0.1),
    "suggest_momentum": Case(
        ln.suggest_momentum, {"phase": (-0.1,), "alternating": (None,), "eigenvalues": ([1j],)}, eigenvalues=eigenvalues
    ),
    # hypergradient
    "AdamDiagonal": Case(ln.AdamDiagonal, {"damping": (0.1,)}),
    "ConjugateGradient": Case(ln.ConjugateGradient, {"preconditioner": (ANY,)}),
    "Current": Case(ln.Current),
    "DenseSolve": Case(ln.DenseSolve),
    "EvaluationPoint": Case(ln.EvaluationPoint),
    "FiniteDifference": Case(ln.FiniteDifference, {"epsilon": (0.1,), "sides": (1, 2)}),
    "GaussNewton": Case(ln.GaussNewton, {"outputs": (TEXT,)}, outputs=torch.ones(2)),
    "Hessian": Case(ln.Hessian),
    "Identity": Case(ln.Identity),
    "KroneckerFactored": Case(ln.KroneckerFactored, {"damping": (0.1,), "relative": (0.1,)}),
    "KroneckerFisher": Case(ln.KroneckerFisher, module=line, parameters=dict(line.named_parameters())),
    "LookAhead": Case(ln.LookAhead),
    "Minimize": Case(Minimize),
    "Neumann": Case(ln.Neumann, {"step_size": (0.1,)}),
    "Nystrom": Case(ln.Nystrom),
    "check_products": Case(
        ln.check_products, dict.fromkeys(("problem", "params", "v", "loss", "repeat"), (ANY,)),
        problem=linearized, params=(w,), v=(torch.ones(2),),
    ),
    "check_hypergradient": Case(
        ln.check_hypergradient,
        {
            **_solvers, "hypergradient": ([h],), "retrain": (ANY,), "epsilon": (0.1,), "generator": (generator,),
            "another_batch": (inner,),
        },
        inner_loss=inner, outer_loss=outer, params=[torch.full((2,), -0.5)], hparams=[torch.tensor(0.5)],
    ),
    "implicit_hypergradient": Case(
        ln.implicit_hypergradient, {**_solvers, "inner_loss": (sgd,)},
        inner_loss=partial(inner, [w], [h]), outer_loss=w.sum(), params=[w], hparams=[h],
    ),
    "influence": Case(
        ln.influence,
        dict.fromkeys(("module", "training_data", "validation_data", "loss", "solver"), (ANY,)),
        module=nn.Linear(2, 1), training_data=[(torch.ones(3, 2), torch.ones(3, 1))],
        validation_data=[(torch.ones(3, 2), torch.zeros(3, 1))],
    ),
    "unrolled_hypergradient": Case(
        ln.unrolled_hypergradient, {"truncate": (1,), "checkpoint": (ANY,)},
        step=one_step, outer_loss=outer, params=[w], hparams=[h], num_steps=2,
    ),
    # hypernetworks
    "DenseResponse": Case(ln.DenseResponse, module=nn.Linear(2, 2), **_hyper),
    "DiagonalResponse": Case(ln.DiagonalResponse, module=nn.Linear(2, 2), num_hyperparameters=6),
    "FactorisedResponse": Case(ln.FactorisedResponse, module=nn.Linear(2, 2), **_hyper),
    "FixedScale": Case(ln.FixedScale),
    "GlobalNormal": Case(ln.GlobalNormal, {"mean": (-1.0, (-0.5,))}),
    "GlobalUniform": Case(ln.GlobalUniform, {"low": (-1.0,), "high": (2.0,)}, low=-2.0, high=-0.5),
    "HyperConv1d": Case(ln.HyperConv1d, {"kernel_size": (ANY,)}, **_conv, **_hyper),
    "HyperConv2d": Case(ln.HyperConv2d, {"kernel_size": (ANY,)}, **_conv, **_hyper),
    "HyperEmbedding": Case(ln.HyperEmbedding, num_embeddings=3, embedding_dim=2, **_hyper),
    "HyperLinear": Case(
        ln.HyperLinear, {"device": (ANY,), "dtype": (ANY,)}, in_features=2, out_features=2, **_hyper
    ),
    "HyperLSTM": Case(ln.HyperLSTM, input_size=2, hidden_size=3, **_hyper),
    "LearnedScale": Case(ln.LearnedScale),
    "NoPerturbation": Case(ln.NoPerturbation),
    "best_response": Case(ln.best_response, {"rank": (1,), "batch_dim": (-1,)}, module=nn.Linear(2, 2), **_hyper),
    # hyperparameters
    "Betas": Case(ln.Betas, _named | _transform | {"init": ((0.8, 0.99),)}),
    "Brightness": Case(ln.Brightness, _named),
    "Categorical": Case(ln.Categorical, {"options": (ANY,)}, name=TEXT, options=["a", "b"]),
    "Contrast": Case(ln.Contrast, _named),
    "Cutout": Case(ln.Cutout, _named),
    "DropConnect": Case(ln.DropConnect, _named | {"include": ([TEXT], TEXT), "temperature": (0.1,)}),
    "DropoutRates": Case(ln.DropoutRates, _named | {"init": (0.1,), "temperature": (0.1,)}),
    "ExampleWeights": Case(ln.ExampleWeights, _named | _transform, num_examples=3),
    "Exp": Case(Exp),
    "FeatureDecay": Case(ln.FeatureDecay, _named | _transform, num_features=3),
    "GroupWeights": Case(
        ln.GroupWeights, _named | {"names": ([TEXT],), "init": ([1.0],), "shares": ([1.0],)}, names=["a", "b"]
    ),
    "Hue": Case(ln.Hue, _named),
    "InputNoise": Case(ln.InputNoise, _named),
    "Integer": Case(ln.Integer, dict.fromkeys(("lower", "upper", "init"), (-2,)), name=TEXT, lower=-3, upper=3, init=0),
    "Interval": Case(Interval, dict.fromkeys(("lower", "upper"), (-1.0,))),
    "LabelSmoothing": Case(ln.LabelSmoothing, _named),
    "LearningRate": Case(ln.LearningRate, _named | _transform | {"init": (0.1,)}),
    "LossWeights": Case(ln.LossWeights, _named | _transform | {"names": ([TEXT],), "init": ([1.0],)}, names=["a"]),
    "ModuleTensors": Case(ln.ModuleTensors, path=TEXT),
    "Momentum": Case(ln.Momentum, _named | _transform | {"init": (0.5,)}),
    "Rotation": Case(ln.Rotation, _named),
    "Saturation": Case(ln.Saturation, _named),
    "Scalar": Case(ln.Scalar, _transform | {"init": (-1.0,)}, name=TEXT, init=0.5),
    "Scaling": Case(ln.Scaling, _named),
    "SharedAdam": Case(ln.SharedAdam, params=parameters),
    "Shear": Case(ln.Shear, _named),
    "Translation": Case(ln.Translation, _named),
    "WeightDecay": Case(
        ln.WeightDecay, _named | _transform | {"include": ([TEXT],), "exclude": ([TEXT],), "init": (0.1,)}
    ),
    "WeightNetwork": Case(ln.WeightNetwork, _named),
    # modules
    "ActorCritic": Case(ln.ActorCritic, {"loop": (ln.GameLoop(),)}, actor=nn.Linear(2, 2), critic=nn.Linear(2, 1)),
    "Anneal": Case(ln.Anneal, {"start": (-1.0,), "end": (-1.0,)}, start=0.5, end=0.25, steps=3),
    "AugmentedLagrangian": Case(
        SmallConstrained, {"optimizers": ({"weights": sgd},), "loop": (ln.GameLoop(),)}, num_inequalities=1
    ),
    "BigGAN": Case(
        ln.BigGAN, {"generator_scheduler": (step_scheduler,), "discriminator_scheduler": (step_scheduler,)}
        | {"loop": (ln.GameLoop(),)}, networks=BigGANNetworks(width=1, latent_dim=4),
    ),
    "BigGANNetworks": Case(BigGANNetworks, {"attention": ((16,),)}),
    "BigGANObjective": Case(BigGANObjective, {"augment": (DiffAugment(),), "regularizers": ((GradientPenalty(),),)}),
    "DeltaSTN": Case(ln.DeltaSTN),
    "DiffAugment": Case(DiffAugment, {"probability": (_anneal,)}),
    "DistillationModule": Case(
        ln.DistillationModule, _schedules | {"network": (nn.Linear(2, 2), "cnn"), "network_options": ({"hidden": [3]},)}
        | {"restart_every": (None,)},
    ),
    "Execution": Case(Execution),
    "GANModule": Case(
        ln.GANModule,
        {"loss": (Hinge(),), "num_classes": (3,), "augment": (DiffAugment(),), "regularizers": ((GradientPenalty(),),)},
        generator=nn.Linear(2, 2), discriminator=nn.Linear(2, 1), latent_dim=2,
    ),
    "GameLoop": Case(ln.GameLoop, {"gradient_clip_val": (1.0, {"a": 1.0})}),
    "GameModule": Case(
        SmallGame,
        {"optimizer": (sgd,), "optimizers": ({"a": sgd},), "scheduler": (step_scheduler,)}
        | {"schedulers": ({"a": step_scheduler}, {"a": None}), "steps_per_player": ({"a": 1},)},
    ),
    "Global": Case(ln.Global, response_steps=3),
    "GradientPenalty": Case(GradientPenalty, {"weight": (_anneal,)}),
    "HypernetworkModule": Case(
        ln.HypernetworkModule, _schedules | {"hyperparameters": ([ln.WeightDecay()],)},
        network=nn.Linear(2, 2), hyperparameters=ln.WeightDecay(),
    ),
    "ImageClassifier": Case(
        ln.ImageClassifier, _schedules | {"network": (nn.Linear(2, 2), "cnn"), "network_options": ({"hidden": [3]},)}
    ),
    "Implicit": Case(Implicit, {"curvature": (ln.Hessian(),)}),
    "LanguageModel": Case(
        ln.LanguageModel, _schedules | {"network": (nn.Linear(2, 2), "gpt"), "network_options": ({"width": 4},)}
    ),
    "Local": Case(ln.Local),
    "LoopOptions": Case(LoopOptions, {"gradient_clip_val": (1.0,), "restart_every": (3,)}),
    "NestedModule": Case(
        Small, _schedules | {"hyperparameters": (TEXT, [ln.WeightDecay()], [TEXT]), "inner_optimizer": (sgd,)}
        | {"inner_steps_per_outer": (3,)}, hyperparameters=ln.WeightDecay(),
    ),
    "ResponseMonitor": Case(ln.ResponseMonitor, {"solver": (None,)}),
    "ResponseOptions": Case(
        ln.ResponseOptions, {"per_example": (True,), "monitor": (ln.ResponseMonitor(),), "gradient_clip_val": (1.0,)}
    ),
    "STN": Case(ln.STN),
    "R2": Case(R2, {"weight": (_anneal,)}),
    "Sampling": Case(Sampling, {"truncation": (1.0,)}),
    "Simplified": Case(ln.Simplified),
    "TunedImageClassifier": Case(
        ln.TunedImageClassifier,
        {"hyperparameters": ([ln.WeightDecay()],), "network": (nn.Linear(2, 2),)}
        | {"network_options": ({"hidden": [3]},)},
        hyperparameters=ln.WeightDecay(),
    ),
    "Unrolled": Case(Unrolled, {"truncate": (1,)}, num_steps=2),
    # networks
    "MLP": Case(MLP, in_features=3),
    "AugmentationNetwork": Case(AugmentationNetwork),
    "CIFARAlexNet": Case(CIFARAlexNet, width=2, hidden=4),
    "CIFARResNet": Case(CIFARResNet, width=2),
    "SmallCNN": Case(SmallCNN),
    # optim
    "ComplexAdam": Case(ln.ComplexAdam, _optimizers | {"phase": (-0.1,)}, params=parameters),
    "ComplexSGD": Case(ln.ComplexSGD, _optimizers | {"phase": (-0.1,)}, params=parameters, lr=0.1),
    "Extragradient": Case(ln.Extragradient, _optimizers, params=parameters, lr=0.1),
    "ExtrapolationFromThePast": Case(ln.ExtrapolationFromThePast, _optimizers, params=parameters, lr=0.1),
    "NuPI": Case(ln.NuPI, _optimizers | {"proportional": (-0.1,)}, params=parameters, lr=0.1),
    "OptimisticAdam": Case(ln.OptimisticAdam, _optimizers, params=parameters),
    "OptimisticSGD": Case(ln.OptimisticSGD, _optimizers, params=parameters, lr=0.1),
}  # fmt: skip
