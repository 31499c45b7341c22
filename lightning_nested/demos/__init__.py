"""Reports and toy modules that the shipped configurations use."""

from lightning_nested.demos.augmentation_report import AugmentationReport
from lightning_nested.demos.distillation_report import DistillationReport
from lightning_nested.demos.game_report import GameReport
from lightning_nested.demos.heat_equation import HeatEquation
from lightning_nested.demos.label_noise_report import LabelNoiseReport
from lightning_nested.demos.mixture_report import MixtureReport
from lightning_nested.demos.mode_coverage import ModeCoverage
from lightning_nested.demos.return_report import ReturnReport
from lightning_nested.demos.schedule_report import ScheduleReport
from lightning_nested.demos.tuning_report import TuningReport
from lightning_nested.demos.zoo_game import ZooGame

__all__ = [
    "AugmentationReport",
    "DistillationReport",
    "GameReport",
    "HeatEquation",
    "LabelNoiseReport",
    "MixtureReport",
    "ModeCoverage",
    "ReturnReport",
    "ScheduleReport",
    "TuningReport",
    "ZooGame",
]
