"""The shipped hypernetwork: a short run from the command line, and its settings printed and read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lightning_nested.cli.main import main


@pytest.mark.usefixtures("own_folder")
def test_a_short_run(tmp_path: Path) -> None:
    """Trains the response, steps the hyperparameters, and writes a checkpoint that has them."""
    options = [
        "--trainer.max_epochs=2",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.default_root_dir=runs",
        "--trainer.enable_progress_bar=false",
    ]
    options += ["--model.loop.warmup_steps=2", "--model.network_options.width=2", "--trainer.logger=false"]
    main(["fit", "--config", "hypernet_digits", *options])
    (path,) = tmp_path.rglob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["hypernetwork"]
    assert state["inner_steps"] == checkpoint["global_step"] > 10
    assert state["outer_steps"] == (state["inner_steps"] - 2) // 5
    tuned = state["outer"]["hyperparameters"]
    assert set(tuned) == {"brightness", "contrast", "input_noise", "cutout", "label_smoothing"}


@pytest.mark.usefixtures("own_folder")
def test_the_settings_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*options: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["fit", *options, "--print_config"])
        assert end.value.code in (None, 0)
        return capsys.readouterr().out

    first = printed("--config", "hypernet_digits", "--model.loop.response_every=3")
    (tmp_path / "printed.yaml").write_text(first)
    assert printed("--config", "printed.yaml") == first
    loop = yaml.safe_load(first)["model"]["init_args"]["loop"]
    assert loop["class_path"].endswith("DeltaSTN")
    assert (loop["init_args"]["response_every"], loop["init_args"]["train_steps"]) == (3, 5)
