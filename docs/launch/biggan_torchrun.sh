#!/bin/sh
# torchrun starts the processes and Lightning joins them: --nproc-per-node must equal trainer.devices.
set -eu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" # torchrun's own choice of 1 is slow where process 0 computes scores
torchrun --standalone --nproc-per-node "${GPUS:-8}" --module lightning_nested fit \
  --config biggan_cifar10 --trainer.devices "${GPUS:-8}" "$@"
