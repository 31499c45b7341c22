#!/bin/sh
# torchrun starts the processes and Lightning joins them: --nproc-per-node must equal trainer.devices.
set -eu
torchrun --standalone --nproc-per-node "${GPUS:-8}" --module lightning_nested fit \
  --config biggan_cifar10 --trainer.devices "${GPUS:-8}" "$@"
