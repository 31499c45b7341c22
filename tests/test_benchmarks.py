"""Each benchmark runs to its end in a tiny setting; the figures themselves come from full runs."""

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock

import pytest
import torch

from tests.conftest import FASHION_MNIST

FOLDER = Path(__file__).parent.parent / "benchmarks"
Script = Callable[[str, Sequence[str]], Any]

NEEDS_FASHION = pytest.mark.skipif(not FASHION_MNIST.exists(), reason=f"no Fashion-MNIST in {FASHION_MNIST}")

# The peers and the profiler warn on their own behalf.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Script:
    """`run("solvers", [...])`: the script's main, imported as when it is run by name."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def main(name: str, options: Sequence[str]) -> Any:
        before = set(sys.modules)
        try:
            return importlib.import_module(name).main(options)
        finally:
            torch.set_flush_denormal(False)
            for module in set(sys.modules) - before:
                if str(getattr(sys.modules[module], "__file__", "")).startswith(str(FOLDER)):
                    monkeypatch.delitem(sys.modules, module)

    return main


@pytest.mark.slow
def test_products_are_as_exact_as_the_table_says(run: Script) -> None:
    found = run("products", ["--rounds", "1", "--only", "GroupNorm", "--precision", "float32"])
    errors = {name.rsplit(", ")[-1]: entry["error"] for name, entry in found.items()}
    assert max(errors["Hessian"], errors["GaussNewton"]) < 1e-5
    assert errors["one-sided"] < 2e-3
    assert errors["central"] < 5e-4


@pytest.mark.slow
def test_one_hypergradient_is_right_and_its_memory_does_not_grow(run: Script, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    size = ["--widths", "20", "10", "5", "--batch", "16"]
    found = run("one_hypergradient", ["--rounds", "1", "--only", "ours", *size, "--output", str(output)])
    for name, entry in found.items():
        if name != "gradient":
            # float32 sums of up to 20 terms
            assert entry["error_to_own_solver"] < 1e-5, name
    memory = {name: entry["memory_bytes"] for name, entry in found.items()}
    assert memory["Neumann 5 / ours"] == memory["Neumann 20 / ours"]
    written = json.loads(output.read_text())
    assert written["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert str(tmp_path) not in output.read_text()


@pytest.mark.parametrize(
    ("widths", "batch"),
    [
        ([196, 125, 125, 10], 64),
        pytest.param([784, 500, 500, 10], 256, marks=pytest.mark.slow),
    ],
    ids=["a quarter", "real"],
)
def test_memory_limits(widths: list[int], batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic, so a hard limit: no more than 3.5 gradients live at once, at any number of terms."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module, measuring = importlib.import_module("one_hypergradient"), importlib.import_module("_measuring")
    problem = module.Problem(widths, batch)
    unit = measuring.live_memory(module.units(problem)["U"])
    memory = {key: measuring.live_memory(call) for key, call in module.ours(problem).items()}
    assert max(memory.values()) <= 3.5 * unit
    for library in ("ours", "ours, Gauss-Newton", "ours, decay in the graph"):
        assert memory["Neumann 5", library] == memory["Neumann 20", library]


@pytest.mark.slow
def test_unrolling_agrees_with_its_full_graph(run: Script) -> None:
    size = ["--widths", "20", "10", "5", "--batch", "16", "--steps", "12"]
    found = run("unrolling", ["--rounds", "1", *size])
    for name, entry in found.items():
        if "implicit" not in name:
            assert entry["error_to_full_graph"] < 1e-5, name
    assert found["ours, checkpoint=20"]["memory_mib"] <= found["ours, full graph"]["memory_mib"]


def test_solvers_reach_one_percent_and_cg_is_first(run: Script) -> None:
    small = ["--rounds", "1", "--budgets", "2", "50", "--steps", "60", "--warmup", "40", "--every", "10"]
    found = run("solvers", small)
    assert found["quadratic"]["conjugate gradient"] <= 12
    assert found["quadratic"]["Neumann, step 1/λ_max"] > 50


@pytest.mark.slow
def test_the_hessian_has_negative_curvature_at_the_start_and_hardly_any_later(
    run: Script, tmp_path: Path
) -> None:
    figure = tmp_path / "hessians.png"
    found = run(
        "conditioning", ["--rounds", "1", "--marks", "0", "100", "--only", "MLP", "--figure", str(figure)]
    )
    first, later = found["MLP"][0]
    assert first["smallest"] < -0.1 < later["smallest"] < 0
    assert later["loss"] < first["loss"]
    assert first["directions"] > 2 * later["directions"]
    assert figure.stat().st_size > 1000


def test_inverses_are_exact_where_the_budget_is_large_enough(run: Script, tmp_path: Path) -> None:
    figure = tmp_path / "quality.png"
    size = ["--rounds", "1", "--marks", "0", "40", "--budgets", "1", "20", "62", "--only", "linear"]
    found = run("inverse_quality", [*size, "--figure", str(figure)])
    (_, later) = found["linear"][0]
    # Condition κ = 30: twenty products leave at most 2((√κ − 1)/(√κ + 1))²⁰ = 1.2e-3 of the error in the norm of H.
    assert later["methods"]["CG"][1][1] < 1.2e-3 * 30**0.5
    cosine = {name: points[min(1, len(points) - 1)][2] for name, points in later["methods"].items()}
    assert cosine["identity"] < cosine["Kronecker-factored, ρ = 0"] < cosine["Neumann"] < cosine["CG"]
    # A product for each of 62 weights: the decays are counted once.
    cost, error, _ = later["methods"]["Nyström"][-1]
    assert (cost, error < 1e-8) == (124, True)
    assert figure.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden", "8", "--methods", "TPE"], "TPE must go without --hidden"),
        (["--methods", "TPe"], "invalid choice: 'TPe'"),
    ],
)
def test_decays_of_another_model_or_method_are_refused(
    run: Script, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        run("hypernetwork_decays", options)
    assert message in capsys.readouterr().err


def test_few_points_have_thirds_and_decays_equal_but_for_rounding_tell_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    bias = importlib.import_module("hypernetwork_bias")
    assert bias.thirds([1.0, 0.0], [2.0, 4.0]) == (3.0, 4.0, 2.0)
    data = MagicMock(noise=torch.tensor([False, False, True, True]))
    module = MagicMock(network=[torch.nn.Linear(4, 2)])
    module.score.return_value = 0.0
    given = importlib.import_module("_experiment_tabular").Given(data, 0, 1)
    logs = torch.tensor(0.01).log() + 2e-7 * torch.arange(4.0, dtype=torch.float64)
    assert given.numbers(module, 0.0, logs)["by_decays"] == 0.5
    assert given.numbers(module, 0.0, torch.tensor([-4.0, -3.0, -2.0, -1.0]))["by_decays"] == 1.0


def test_responses_of_ridge_are_what_minimization_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(12, 3, generator=generator), torch.arange(12) % 10
    problem = importlib.import_module("hypernetwork_bias").Ridge.of(
        MagicMock(train=(x, labels), val=(x, labels)), 9
    )
    assert problem.compare(problem.optimum())["errors"] == [0.0] * 9
    basis = torch.stack([torch.ones(9), torch.linspace(-8 / 9, 8 / 9, 9)], 1).double()
    coefficients = torch.zeros(2, *problem.slope.shape, dtype=torch.float64, requires_grad=True)

    def training_loss(weights: torch.Tensor) -> torch.Tensor:
        return (0.5 * problem.bent.unsqueeze(2) * weights.square() - problem.slope * weights).sum()

    weights = torch.zeros_like(problem.optimum())
    descent = torch.optim.LBFGS([coefficients], max_iter=200, tolerance_grad=1e-12, tolerance_change=0.0)

    def closure() -> torch.Tensor:
        descent.zero_grad()
        loss = training_loss(torch.einsum("md,dpk->mpk", basis, coefficients))
        loss.backward()
        return loss

    descent.step(closure)
    linear = torch.einsum("md,dpk->mpk", basis, coefficients.detach())
    torch.testing.assert_close(problem.polynomial(1), linear, rtol=0, atol=1e-8)
    nearer = problem.polynomial(1, by_distance=True) - problem.optimum()
    assert nearer.norm() < (linear - problem.optimum()).norm()
    for _ in range(5):
        weights = weights - (problem.bent.unsqueeze(2) * weights - problem.slope) / problem.bent.max()
    torch.testing.assert_close(problem.after(5), weights, rtol=0, atol=1e-12)


def test_callback_cost_runs(run: Script) -> None:
    found = run("callback_cost", ["--rounds", "1", "--steps", "80"])
    assert found["a step without callback"].median > 0


def test_outer_step_cost_runs(run: Script) -> None:
    found = run("outer_step_cost", ["--rounds", "1", "--steps", "60"])
    parts = [
        found[name].median for name in found if name not in ("a plain step of the fit", "the functions alone")
    ]
    assert 0 < max(parts[1:]) < parts[0]


@pytest.mark.slow
def test_solves_with_each_kind_of_product_are_timed(run: Script) -> None:
    found = run("products", ["--solves", "--rounds", "1", "--only", "MLP", "--precision", "float32"])
    assert {entry["products"] for entry in found.values()} == {5}


@pytest.mark.slow
def test_a_million_decays_are_measured(run: Script) -> None:
    found = run("million_decays", ["--rounds", "1", "--steps", "2"])
    assert len(found) == 3
    assert all(number >= 0 for ((*numbers,),) in found.values() for number in numbers)


@pytest.mark.slow
def test_only_unrolling_takes_more_memory_with_more_steps(run: Script, tmp_path: Path) -> None:
    figure = tmp_path / "memory.png"
    size = ["--widths", "60", "30", "5", "--steps", "2", "8", "--terms", "2", "10"]
    found = run("million_memory", [*size, "--figure", str(figure)])
    unrolled, implicit = found["inner steps"]["unrolled"], found["inner steps"]["implicit, 20 terms"]
    assert unrolled[8] > 2 * unrolled[2]
    assert implicit[8] < 1.2 * implicit[2]
    assert found["terms"]["implicit"][10] == pytest.approx(found["terms"]["implicit"][2], rel=0.2)
    assert figure.stat().st_size > 1000


def test_example_weights_tell_wrong_labels(run: Script) -> None:
    ((found,),) = run("example_weights", ["--tasks", "0", "--seeds", "100", "--steps", "200"]).values()
    arms = ("plain", "right", "trusted", "together", "small_loss", "ours")
    assert min(found[key] for key in arms) > 0.5
    # Chance gives 0.5, with a standard deviation of 0.02 for 280 and 420 labels.
    assert min(found["small_loss_auroc"], found["ours_auroc"]) > 0.55
    assert min(found["small_loss_cost"], found["ours_cost"]) > 0


@pytest.mark.slow
def test_optimizers_run_and_make_the_same_steps(run: Script) -> None:
    found = run("optimizers", ["--rounds", "1", "--tensors", "3", "--elements", "300"])
    for name, entry in found.items():
        if entry["error_to_float64"] is not None:
            # five float32 steps on numbers of about 1, over changes of about 0.005 and more
            assert entry["error_to_float64"] < 1e-3, name


def test_lyapunov_cost_runs_and_agrees_with_float64(run: Script) -> None:
    small = ["--rounds", "1", "--widths", "12", "10", "5", "--batch", "16", "--ks", "2", "--steps", "10"]
    found = run("lyapunov_cost", [*small, "--trainer_steps", "5"])
    assert found["accuracy"]["float32, every 5"] < 1e-5
    assert 0 < found["k=2 / share of frame handling"] < 1
    assert len(found) == 9


def test_small_maps_are_measured(run: Script) -> None:
    found = run("lyapunov_small_maps", ["--rounds", "1", "--steps", "20", "--no-compile"])
    assert len(found) == 3
    assert all(entry["setup"].median > 0 for entry in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits", "fashion"])
def test_against_search_runs(run: Script, data: str) -> None:
    if data == "fashion" and not FASHION_MNIST.exists():
        pytest.skip("no Fashion-MNIST here: apt-get install dataset-fashion-mnist")
    found = run("against_search", ["--data", data, "--rounds", "1", "--trainings", "4", "--steps", "60"])
    assert any(name.startswith("ours") for name in found["tuners"])


@pytest.mark.slow
def test_hypernetworks_run(run: Script, fashion_mnist: Path) -> None:
    cost = run("hypernetwork_cost", ["--rounds", "1", "--batch", "2"])
    assert cost["transformer, parameters"]["general"] == 910_544
    curves = run("hypernetwork_curves", ["--rounds", "1", "--steps", "50", "--points", "3", "--size", "50"])
    assert len(curves["seeds"][0]["one"]["grid"]) == 30
    decays = run(
        "hypernetwork_decays", ["--rounds", "1", "--trainings", "2", "--steps", "20", "--size", "50"]
    )
    assert {"hypernetwork, one slope per weight", "implicit", "unrolled"} <= set(decays["found"])
    deep = [
        "--hidden",
        "8",
        "--methods",
        "hypernetwork, one slope per weight",
        "grid of one decay",
        "random search",
    ]
    deeper = run(
        "hypernetwork_decays", ["--rounds", "1", "--trainings", "2", "--steps", "20", "--size", "50", *deep]
    )
    assert len(deeper["found"]) == 3
    settings = ["--settings", "uncentred,8,50", "centred,8,50"]
    bias = run("hypernetwork_bias", ["--rounds", "1", *settings, "--points", "3", "--size", "50"])
    (_, found), (_, exact) = bias["softmax"][0], bias["ridge"][0]
    assert min(found["uncentred, 8 units, 50 steps"]["excess"]) > 0
    assert max(map(abs, exact["any, 100000 steps"]["errors"])) < 1e-3
    cnn = run("hypernetwork_cnn", ["--rounds", "1", "--epochs", "1", "--size", "1000", "--warmup", "2"])
    assert "a fresh network, Delta-STN's last values held fixed" in cnn["seeds"][0]


def test_what_one_line_pays_is_drawn_for_the_methods_that_ran(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    pays = importlib.import_module("pays")
    assert [pays.has_laplace(task) for task in pays.TASKS] == [True, False, True, True, True] + [False] * 3
    runs = [
        {"plain": (2.0, 0.5), "grid": (1.5, 0.6), "tuned": (1.6, 0.6), "cost": 1.2 + 0.1 * i}
        for i in range(3)
    ]
    pays.figure(tmp_path / "pays.png", {"a": runs, "b": [{**run, "tpe": (1.4, 0.6)} for run in runs]})
    assert (tmp_path / "pays.png").read_bytes().startswith(b"\x89PNG")

    class Panel:
        """Records points."""

        points: ClassVar[list[tuple[float, float]]] = []

        def errorbar(self, x: float, y: float, **_: Any) -> None:
            self.points.append((x, y))

        def __getattr__(self, name: str) -> Any:
            return MagicMock()

    drawn: dict[str, Any] = {}
    pays._draw(Panel(), runs, drawn)
    assert Panel.points == [(1.0, 1.0), (pytest.approx(1.3), 0.8), (11.0, 0.75)]
    assert len(drawn) == 3


def test_biggan_cost_measures_three_loops(run: Script) -> None:
    found = run("biggan_cost", ["--rounds", "1", "--width", "2", "--batch", "2"])
    assert set(found) == {
        "BigGAN in the Trainer",
        "hand-written loop, Adam",
        "hand-written loop, ComplexAdam",
    }


def test_biggan_estimate_counts_the_operations_of_one_update(run: Script) -> None:
    found = run("biggan_estimate", ["--width", "2", "--batch", "2", "--no-memory"])
    assert found["flop_per_update"] > 1e6
    # Width 2 with z 128: the linear layer of the generator has 120 more inputs to its 128 outputs than with z 8.
    assert found["parameters"] == 6067 + 4505 + 120 * 128


def test_a_game_update_in_the_trainer_costs_more_than_by_hand(run: Script) -> None:
    found = run("game_cost", ["--rounds", "3", "--updates", "80"])
    for quartiles in found.values():
        assert 0 < quartiles["by hand"][1] < quartiles["GameModule"][1]


@pytest.mark.slow
def test_riders_say_what_the_ends_of_runs_are(run: Script) -> None:
    options = [
        "--games",
        "matching pennies",
        "mix",
        "--seeds",
        "2",
        "--no_rider",
        "--no_wells",
        "--gan_seeds",
        "0",
    ]
    found = run("riders", options)
    assert all(abs(x) < 0.02 for losses in found["matching pennies / LOLA"] for x in losses)
    module = importlib.import_module("riders")
    names = [module.named(module.GAMES["mix"][0], (torch.full((1,), a),) * 2) for a in (-9.0, 9.0, 0.0)]
    assert names == ["defection", "cooperation", "(1.7, 1.7)"]
    kinds = [{"cooperation", "(1.0, 1.3)"}, {"(1.0, 1.3)"}, {"(2.0, 2.0)"}]
    assert module.counted(kinds, most=2) == "cooperation 1, (1.0, 1.3) 2, 1 rarer ones"


@pytest.mark.parametrize(
    "name",
    [
        "distillation", "influence", "breast_cancer", "diabetes", "diamonds", "language", "mixture", "pinn",
        pytest.param("hypernetwork_resnet", marks=pytest.mark.slow),
        pytest.param("hypernetwork_transformer", marks=pytest.mark.slow),
        *(pytest.param(name, marks=NEEDS_FASHION) for name in ("distillation_fashion", "labels_symmetric", "rotation")),
        *(pytest.param(name, marks=NEEDS_FASHION) for name in ("long_tail", "overfit", "validation_share")),
    ],
)  # fmt: skip
def test_an_experiment_compares_its_arms(run: Script, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = run("experiments", [name, "--size", "smoke", "--seeds", "100"]).values()
    assert len(others) >= 1
    for (entry,) in (first, *others):
        assert entry["seed"] == 100
        assert entry["cost"] == entry["seconds"] / first[0]["seconds"] > 0
        assert len(entry) > 3
    assert "| cost, × the first" in capsys.readouterr().out


@pytest.mark.parametrize("across", ["", "share"])
def test_an_experiment_keeps_seeds_and_draws_them(
    run: Script,
    across: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    arms, experiments = importlib.import_module("_arms"), importlib.import_module("experiments")
    experiment = arms.Experiment(
        question="Three arms, of numbers",
        prepare=lambda seed, size: seed,
        arms={
            name: lambda seed, cost=cost: {"few": seed / 100, "many": 3.0 * cost, "seconds": cost}
            for name, cost in (("plain", 0.5), ("dear", 200.0), ("cheap", 0.25))
        },
        columns={key: arms.Column(title=key) for key in ("few", "many")},
        across=across,
    )
    monkeypatch.setitem(experiments.EXPERIMENTS, "pinn", experiment)
    kept, drawn = tmp_path / "kept.json", tmp_path / "drawn.png"
    options = ["pinn", "--size", "smoke", "--keep", str(kept)]
    experiments.main([*options, "--seeds", "100", "--figure", str(drawn)])
    assert drawn.stat().st_size > 1000
    experiments.main([*options, "--seeds", "101", "--only", "cheap"])
    experiments.main([*options, "--seeds", "101", "--only", "cheap"])
    found = json.loads(kept.read_text())
    seeds = {name: [entry["seed"] for entry in entries] for name, entries in found.items()}
    assert seeds == {"plain": [100, 101], "dear": [100], "cheap": [100, 101]}
    assert {entry["cost"] for entry in found["dear"]} == {400.0}
    out = capsys.readouterr().out
    assert "1.005 [1.000, 1.010]" in out
    assert out.count("cost, × the first") == 3


def test_decays_that_differ_by_rounding_alone_find_no_columns_of_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("_experiment_tabular")
    noise = torch.arange(50) >= 10
    given = module.Given(MagicMock(noise=noise), 100, 40)
    network, data = module.Table(50, 1, 0.0), given.data
    data.test_inputs, data.test_target = torch.zeros(2, 50), torch.zeros(2, 1)
    # A mean over rows rounds by the position of a column.
    equal = torch.full((50,), -5.3).nextafter(torch.where(torch.arange(50) < 32, -6.0, -5.3))
    assert given.numbers(network, 0.0, equal)["by_decays"] == 0.5
    assert given.numbers(network, 0.0, equal + 1e-3 * noise)["by_decays"] == 1.0


def test_arms_of_labels_get_the_images_that_others_tune_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    module, found = importlib.import_module("_experiment_labels"), []

    def fit(
        given: Any, *, images: torch.Tensor, labels: torch.Tensor, rows: Any = None
    ) -> tuple[None, float]:
        found.append((images, labels if rows is None else labels[rows]))
        return None, 0.0

    monkeypatch.setattr(module.Given, "fit", fit)
    monkeypatch.setattr(module.Given, "numbers", lambda *args: {})
    train, val = torch.tensor([0] * 50 + [1] * 5), torch.tensor([0, 1, 2])
    data = MagicMock(
        train_labels=train, val_labels=val, train_images=torch.zeros(55, 1), val_images=torch.ones(3, 1)
    )
    given = module.Given(data, 100, 20)
    module.on_both(given)
    module.balanced_both(given)
    assert all(int(images.sum()) == 3 and len(images) == 58 for images, _ in found)
    assert torch.equal(found[0][1], torch.cat([train, val]))
    # 20 batches of 128 of three classes: 853 of each, standard deviation 24.
    assert (found[1][1].bincount() - 853.3).abs().max() < 5 * 24


def test_training_again_costs_what_its_tuning_costs_too_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("_experiment_share")
    seconds = iter((4.0, 1.0, 1.0))
    network = module.Network()
    monkeypatch.setattr(module.Given, "fit", lambda *args, **options: (network, next(seconds)))
    monkeypatch.setattr(module.WeightDecay, "decays", lambda decay: {})
    rows = torch.zeros(10, 196), torch.zeros(10, dtype=torch.long)
    given = module.Given(rows, rows, 100, 20)
    costs = [module.again("few")(given), module.tuned("few")(given), module.again("few")(given)]
    assert [numbers["seconds"] for numbers in costs] == [5.0, 4.0, 5.0]


def test_the_experiment_of_an_augmentation_network(run: Script, fashion_mnist: Path) -> None:
    found = run("experiments", ["augmentation", "--size", "smoke", "--seeds", "100"])
    assert len(found) == 4
    assert all(0 <= entry["accuracy"] <= 1 for (entry,) in found.values())


def test_projects_of_others(run: Script) -> None:
    """Those that need no other package."""
    (pair,) = run("projects", ["--rounds", "1", "--only", "gpt", "--epochs", "1"])["gpt"]
    assert pair["tuned"]["outer_steps"] > 0
    assert pair["plain"]["test"] > 0


def test_what_outer_steps_hold_for_a_gpt(run: Script) -> None:
    found = run("large_model_memory", ["--width", "8", "--depth", "1"])
    default, current = found["the default"], found["Neumann(num_terms=5), Current()"]
    assert default["Kronecker factors"] > 0
    assert "Kronecker factors" not in current or not current["Kronecker factors"]
    assert current["solver"] > default["solver"]
