"""Check this machine's GPU and measure on it: one table and one JSON file, in at most eight minutes, without network.

    scripts/verify_gpu.sh                # or: PYTHON=/path/to/python scripts/verify_gpu.sh
    scripts/verify_gpu.sh --toy          # every stage at toy size, on the CPU where there is no GPU

Runs from the source tree: torch, Lightning, torchmetrics, lazy-loader, scikit-learn and pytest are enough. Each stage
is a process of its own with a time limit, so that one that fails or hangs is a row of the table and not the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UPDATES = 125_000  # of the reference run on CIFAR-10
# Seconds that a stage may take; the last may have all that is left of TOTAL, because compiling is what takes long.
LIMITS = {
    "tests": 90,
    "main job": 60,
    "hypergradient": 60,
    "optimizers": 80,
    "BigGAN": 60,
    "BigGAN, compiled": 110,
}
TOTAL = 470
# At toy size a busy machine without GPU has more time.
TOY_PATIENCE = 6


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def waiting(call: Callable[[], object]) -> Callable[[], object]:
    """Return the call and a wait for the device, for clocks."""

    def run() -> None:
        call()
        synchronize()

    return run


def peak_memory(call: Callable[[], object]) -> float | None:
    """Return MiB that a call allocates at its peak beyond what was there; None on the CPU."""
    if DEVICE.type != "cuda":
        return None
    call()
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# ---- stages: each returns plain numbers


def tests(toy: bool) -> dict[str, Any]:
    """Run the tests that need a CUDA device; warnings of other releases are no errors here."""
    where = ["tests/callbacks/test_hypergradient_cuda.py"] if toy else ["tests"]
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--color=no"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *where],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    if done.returncode not in (0, 5):
        raise RuntimeError("\n".join(lines[-40:]))
    return {"summary": lines[-1].strip("= ")}


def main_job(toy: bool) -> dict[str, Any]:
    """Train on digits with 40 % wrong labels, without and with weights tuned for the images: seconds and accuracy."""
    from _running import silent_trainer

    from lightning_nested.callbacks import HypergradientCallback
    from lightning_nested.datamodules import DigitsDataModule
    from lightning_nested.hypergradient import Current, Neumann
    from lightning_nested.hyperparameters import ExampleWeights
    from lightning_nested.modules import ImageClassifier

    found: dict[str, Any] = {}
    for name in ("untuned", "tuned"):
        tuner = HypergradientCallback(
            ExampleWeights(700), solver=Neumann(num_terms=5), at=Current(), warmup_steps=20, every_n_steps=2,
            optimizer=lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-4),
        )  # fmt: skip
        torch.manual_seed(0)
        data = DigitsDataModule(
            wrong_label_fraction=0.4, with_index=True, batch_size=700, val_batch_size=300, train_size=700, seed=0
        )  # fmt: skip
        module = ImageClassifier(
            network="mlp", network_options={"hidden": [200], "dropout": 0.5},
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        )  # fmt: skip
        trainer = silent_trainer(
            *([tuner] if name == "tuned" else []), accelerator=DEVICE.type, devices=1, num_sanity_val_steps=0,
            max_epochs=30 if toy else 300, limit_val_batches=0 if name == "untuned" else 1.0,
            check_val_every_n_epoch=50, log_every_n_steps=1,
        )  # fmt: skip
        began = time.perf_counter()
        trainer.fit(module, data)
        found[f"{name}: s"] = time.perf_counter() - began
        (result,) = trainer.test(module, data, verbose=False)
        found[f"{name}: accuracy"] = next(v for k, v in result.items() if "acc" in k)
    return found


def hypergradient(toy: bool) -> dict[str, Any]:
    """One hypergradient of a network of ten million weights with a decay each, in units of a gradient."""
    # Of benchmarks/, which is no package.
    measuring, benchmark = import_module("_measuring"), import_module("one_hypergradient")
    problem_of, peers = import_module("_problem").Problem, import_module("_peers").peers

    widths, batch = ([64, 32, 10], 16) if toy else ([784, 2560, 2560, 512, 10], 256)
    problem, exact = (_moved(problem_of(widths, batch, dtype)) for dtype in (torch.float32, torch.float64))
    contestants = {key: call for key, call in benchmark.ours(problem).items() if "Gauss-Newton" not in key[1]}
    contestants |= peers(problem)
    wide = benchmark.ours(exact)
    unit = {name: waiting(call) for name, call in benchmark.units(problem).items()}
    times = measuring.interleave(
        {" / ".join(key): waiting(call) for key, call in contestants.items()}, unit,
        rounds=3 if toy else 7, threads=2,
    )  # fmt: skip
    one = peak_memory(unit["U"])
    found: dict[str, Any] = {"weights": sum(p.numel() for p in problem.params)}
    for key, call in contestants.items():
        name = " / ".join(key)
        answer, right = call(), wide[key[0], "ours, decay in the graph"]()
        size = math.sqrt(sum(float(r.square().sum()) for r in right))
        off = math.sqrt(
            sum(float((a.double() - r).square().sum()) for a, r in zip(answer, right, strict=True))
        )
        memory = peak_memory(call)
        found[f"{name}: gradients"] = times[name].units["U"].median
        found[f"{name}: ms"] = 1e3 * times[name].seconds.median
        found[f"{name}: error to float64"] = off / size
        if memory is not None and one:
            found[f"{name}: memory in gradients"] = memory / one
    return found


def _moved(problem: Any) -> Any:
    """Return the problem of the benchmark on the device; it is built on the CPU."""
    for tensor in (*problem.params, *problem.decays):
        tensor.data = tensor.data.to(DEVICE)
    for name in ("inputs", "outer_inputs", "labels", "outer_labels"):
        setattr(problem, name, getattr(problem, name).to(DEVICE))
    problem._tilt = tuple(t.to(DEVICE) for t in problem._tilt)
    return problem


def optimizers(toy: bool) -> dict[str, Any]:
    """Steps of ComplexAdam, plain and compiled, in units of torch's fused Adam on the same tensors."""
    from lightning_nested.optim import ComplexAdam

    measuring = import_module("_measuring")
    count, elements = (10, 1_000) if toy else (100, 800_000)

    def params() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(elements, generator=generator).to(DEVICE).requires_grad_() for _ in range(count)]
        for p in made:
            p.grad = torch.randn(elements, generator=generator).to(DEVICE)
        return made

    calls: dict[str, Callable[[], object]] = {
        "ComplexAdam": ComplexAdam(params()).step,
        "ComplexAdam, compiled": torch.compile(ComplexAdam(params()).step, fullgraph=True),
        "torch Adam, foreach": torch.optim.Adam(params(), foreach=True).step,
    }
    found: dict[str, Any] = {"numbers": count * elements}
    for name in list(calls):
        began = time.perf_counter()
        try:
            calls[name]()
        except Exception as error:  # a machine without a compiler still has the other rows
            del calls[name]
            found[f"{name}: failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
            continue
        synchronize()
        found[f"{name}: first step, s"] = time.perf_counter() - began
    unit = {"fused Adam": waiting(torch.optim.Adam(params(), fused=True).step)}
    times = measuring.interleave(
        {name: waiting(call) for name, call in calls.items()}, unit, rounds=5 if toy else 21, threads=2,
        contestant_repeats=3,
    )  # fmt: skip
    for name, timing in times.items():
        found[f"{name}: fused Adam steps"] = timing.units["fused Adam"].median
        found[f"{name}: ms"] = 1e3 * timing.seconds.median
    return found


def biggan(toy: bool, *, compiled: bool = False) -> dict[str, Any]:
    """BigGAN in the shapes of CIFAR-10 on drawn images, bf16 and channels_last: alone, then beside a plain loop."""
    from functools import partial

    from _biggan_loop import PlainLoop, Rounds
    from _running import silent_trainer

    from lightning_nested.datamodules import SyntheticImagesDataModule
    from lightning_nested.modules import BigGAN, BigGANNetworks, Execution
    from lightning_nested.optim import ComplexAdam

    width, batch, rounds, warmup = (2, 4, 2, 1) if toy else (64, 50, 40, 8)
    adam = partial(ComplexAdam, lr=2e-4)
    if toy and DEVICE.type == "cpu":
        # Inductor writes C++ for a CPU, whose compilation takes minutes; here only the way there is tried.
        torch.compile = partial(torch.compile, backend="aot_eager")
    torch.manual_seed(0)
    gan = BigGAN(
        BigGANNetworks(width=width), discriminator_optimizer=adam,
        execution=Execution(log_details=False, compile=compiled),
    )  # fmt: skip
    watch = Rounds(lambda: PlainLoop(gan, data, adam, DEVICE, compiled=compiled), rounds, warmup)
    data = SyntheticImagesDataModule(train_size=watch.batches * batch, val_size=0, batch_size=batch)
    data.setup()
    silent_trainer(
        watch, accelerator=DEVICE.type, devices=1, max_epochs=1, limit_val_batches=0, precision="bf16-mixed"
    ).fit(gan, data)
    alone, loop, ratio = watch.figures()
    found: dict[str, Any] = {
        "ms an update": 1e3 * alone,
        "images a second": 4 * batch / alone,
        "hours of the reference run": UPDATES * alone / 3600,
        "plain loop, ms an update": 1e3 * loop,
        "time over the plain loop's": ratio,
    }
    if watch.memory is not None:
        found["peak memory, MiB"] = watch.memory
    return found


STAGES: dict[str, Callable[[bool], dict[str, Any]]] = {
    "tests": tests,
    "main job": main_job,
    "hypergradient": hypergradient,
    "optimizers": optimizers,
    "BigGAN": biggan,
    "BigGAN, compiled": lambda toy: biggan(toy, compiled=True),
}


# ---- the whole


def environment() -> dict[str, Any]:
    """Return what the figures depend on; nothing that names a host."""
    found: dict[str, Any] = {"python": platform.python_version(), "device": DEVICE.type}
    for package in (
        "torch",
        "lightning",
        "torchmetrics",
        "triton",
        "betty-ml",
        "torchopt",
        "curvlinops-for-pytorch",
    ):
        found[package] = _version(package)
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
        found["memory, MiB"] = properties.total_memory // 2**20
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run_stage(name: str, toy: bool, limit: float) -> dict[str, Any]:
    """Run a stage in a process of its own; return its figures, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "stage.json"
        command = [
            sys.executable,
            __file__,
            "--stage",
            name,
            "--output",
            str(output),
            *(["--toy"] if toy else []),
        ]
        began = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=limit, check=False,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            failed = done.stderr.strip()[-2000:] if done.returncode else None
        except subprocess.TimeoutExpired:
            failed = f"longer than its limit of {limit:.0f} s"
        found: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 1)}
        if failed is None:
            return found | {"figures": json.loads(output.read_text(encoding="utf-8"))}
        return found | {"failed": failed}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return all figures as one Markdown table."""
    rows = ["| stage | what | value |", "|---|---|---|"]
    for name, stage in results.items():
        rows.append(f"| {name} | seconds | {stage['seconds']:.1f} |")
        if "failed" in stage:
            last = (stage["failed"].splitlines() or ["without output"])[-1]
            rows.append(f"| {name} | FAILED | {last[:150]} |")
        for what, value in stage.get("figures", {}).items():
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            rows.append(f"| {name} | {what} | {text} |")
    return "\n".join(rows)


def main() -> int:
    """Run all stages, print the table, write the file; return 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="toy sizes; the CPU does where there is no GPU")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/verify_gpu.json"), help="JSON file to write"
    )
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES), help="stages to run")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.stage:
        warnings.filterwarnings("ignore")
        sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
        figures = STAGES[chosen.stage](chosen.toy)
        chosen.output.write_text(json.dumps(figures), encoding="utf-8")
        return 0
    if DEVICE.type != "cuda" and not chosen.toy:
        print(
            "A CUDA device must be visible. Got none; try every stage on the CPU by --toy.", file=sys.stderr
        )
        return 2
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    about = environment()
    print(", ".join(f"{name} {value}" for name, value in about.items() if value is not None), flush=True)
    results: dict[str, dict[str, Any]] = {}
    began = time.perf_counter()
    for name in chosen.only:
        limit: float = LIMITS[name]
        if name == chosen.only[-1]:
            limit = max(limit, TOTAL - (time.perf_counter() - began))
        results[name] = run_stage(name, chosen.toy, limit * (TOY_PATIENCE if chosen.toy else 1))
        print(f"{name}: {'FAILED' if 'failed' in results[name] else 'done'}", file=sys.stderr, flush=True)
        # After each, so that an interrupted run keeps what it has.
        whole = {"environment": about, "toy": chosen.toy, "stages": results}
        chosen.output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    print(f"\nWrote {chosen.output}")
    return int(any("failed" in stage for stage in results.values()))


if __name__ == "__main__":
    sys.exit(main())
