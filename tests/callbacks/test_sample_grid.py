from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_nested.callbacks import (
    GeneratorEMA,
    SampleGrid,
)
from tests.modules.gan.tiny import data, module, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:You defined a `validation_step`", "ignore:.*sync_dist"
)


def test_grids_have_the_same_z_and_move_nothing(tmp_path: Path) -> None:
    def run(grid: bool) -> dict[str, Tensor]:
        gan = module()
        ema = GeneratorEMA(decay=0.9, start=0)
        callbacks = [ema, SampleGrid(2, per_class=3)] if grid else [ema]
        torch.manual_seed(3)
        trainer(max_steps=5, max_epochs=-1, callbacks=callbacks, default_root_dir=tmp_path).fit(gan, data())
        return gan.state_dict()

    plain, shown = run(False), run(True)
    for name, value in plain.items():
        assert torch.equal(value, shown[name]), name
    files = sorted((tmp_path / "grids").glob("*.png"))
    assert [path.stem for path in files] == ["000002", "000004", "000005"]
    from PIL import Image

    with Image.open(files[0]) as image:
        assert image.size == (3 * 33 + 1, 10 * 33 + 1)


def test_the_grid_goes_to_tensorboard(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    trainer(
        max_steps=2, callbacks=[SampleGrid(1, per_class=2)], logger=logger, default_root_dir=tmp_path
    ).fit(module(), data())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [1, 2]
