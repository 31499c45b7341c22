#!/usr/bin/env bash
# For owners of GPUs: the checks that need a CUDA device, then the main job and a two-device run where there are two.
#   scripts/verify_gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
make .venv/.installed
python=.venv/bin/python

$python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device is visible"; print(torch.cuda.get_device_name())'
$python -m pytest -m gpu -ra
$python -m lightning_nested fit --config clean_digits --trainer.accelerator cuda --trainer.devices 1
if [ "$($python -c 'import torch; print(torch.cuda.device_count())')" -ge 2 ]; then
    $python -m lightning_nested fit --config digits --trainer.accelerator cuda --trainer.devices 2 \
        --trainer.strategy ddp --trainer.callbacks+=HypergradientCallback \
        --trainer.callbacks.hyperparameters=WeightDecay
fi
