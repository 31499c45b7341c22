"""Experiments, arms × seeds on one task each: ``python benchmarks/experiments.py NAME``, ``make experiments NAME=...``.

Each is a few real fits per seed; test data are read once, at the end. ``--size smoke`` runs through in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from _arms import Results, compare, figure, rows
from _experiment_augmentation import AUGMENTATION, AUGMENTATION_FEW
from _experiment_distillation import DISTILLATION, DISTILLATION_FASHION
from _experiment_hypernetworks import RESNET, TRANSFORMER
from _experiment_influence import INFLUENCE
from _experiment_invariances import INVARIANCES, ROTATION
from _experiment_labels import LABELS_55000, LABELS_PAIRWISE, LABELS_SYMMETRIC, LONG_TAIL
from _experiment_language import LANGUAGE
from _experiment_mixture import MIXTURE
from _experiment_overfit import OVERFIT
from _experiment_pinn import PINN
from _experiment_schedule import SCHEDULE_ADAMW, SCHEDULE_SGD
from _experiment_share import VALIDATION_SHARE
from _experiment_tabular import BREAST_CANCER, DIABETES, DIAMONDS
from _fits import quiet
from _measuring import load, parser, print_table, report, start

EXPERIMENTS = {
    "augmentation": AUGMENTATION,
    "augmentation_few": AUGMENTATION_FEW,
    "breast_cancer": BREAST_CANCER,
    "diabetes": DIABETES,
    "diamonds": DIAMONDS,
    "distillation": DISTILLATION,
    "distillation_fashion": DISTILLATION_FASHION,
    "hypernetwork_resnet": RESNET,
    "hypernetwork_transformer": TRANSFORMER,
    "influence": INFLUENCE,
    "invariances": INVARIANCES,
    "labels_55000": LABELS_55000,
    "labels_pairwise": LABELS_PAIRWISE,
    "labels_symmetric": LABELS_SYMMETRIC,
    "language": LANGUAGE,
    "long_tail": LONG_TAIL,
    "mixture": MIXTURE,
    "overfit": OVERFIT,
    "pinn": PINN,
    "rotation": ROTATION,
    "schedule_adamw": SCHEDULE_ADAMW,
    "schedule_sgd": SCHEDULE_SGD,
    "validation_share": VALIDATION_SHARE,
}


def main(argv: Sequence[str] | None = None) -> Results:
    """Run one experiment, and print its table."""
    options = parser(__doc__, rounds=1)
    options.add_argument("name", choices=sorted(EXPERIMENTS))
    options.add_argument(
        "--seeds", type=int, nargs="*", help="default: those that are reported; none: those of --keep alone"
    )
    options.add_argument("--figure", type=Path, help="PNG file to draw: the first column over the cost")
    options.add_argument("--size", choices=("smoke", "real"), default="real")
    options.add_argument("--only", nargs="+", default=[], help="arms beside the first")
    options.add_argument(
        "--keep", type=Path, help="JSON file that seeds are added to, for a table of several runs"
    )
    arguments = options.parse_args(argv)
    start(arguments)
    before = load()
    quiet()
    experiment = EXPERIMENTS[arguments.name]
    results: Results = {}
    if arguments.keep is not None and arguments.keep.exists():
        results = json.loads(arguments.keep.read_text())
    for seed in experiment.seeds if arguments.seeds is None else arguments.seeds:
        for name, entries in compare(experiment, [seed], arguments.size, only=arguments.only).items():
            known = results.setdefault(name, [])
            # Arms may be added to a seed later; the first one then runs again, for their cost.
            known.extend(e for e in entries if e["seed"] not in {kept["seed"] for kept in known})
        if arguments.keep is not None:
            arguments.keep.write_text(json.dumps(results))
    print(f"\n{experiment.question}")
    print_table(*rows(experiment, results))
    if arguments.figure is not None:
        figure(arguments.figure, experiment, results)
    print(f"\nload {before} to {load()}")
    report(arguments, results, load_before=before)
    return results


if __name__ == "__main__":
    main()
