#!/bin/sh
# Checks BigGAN on this machine in about ten minutes: processes, mixed precision, resuming, scores.
# Uses the GPUs if there are any, and two CPU processes otherwise. Arguments: [folder of cifar-10-batches-py]
set -eu
PYTHON="${PYTHON:-python}"
OUT="$(mktemp -d)"
GPUS="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
run() { echo "== $*"; "$PYTHON" -m lightning_nested "$@" --trainer.enable_progress_bar false; }

if [ "$GPUS" -gt 0 ]; then ACCELERATOR=gpu; else ACCELERATOR=cpu; fi
if [ "$GPUS" -eq 1 ]; then DEVICES=1; STRATEGY=auto; else DEVICES=2; STRATEGY=ddp; fi
COMMON="--config biggan_smoke --trainer.accelerator $ACCELERATOR --trainer.devices $DEVICES --trainer.strategy $STRATEGY"

echo "1. processes and scores: $DEVICES on $ACCELERATOR"
# shellcheck disable=SC2086
run fit $COMMON --trainer.default_root_dir "$OUT/full"
test -s "$OUT/full/scores.jsonl"
test -s "$OUT/full/grids/000020.png"

echo "2. mixed precision"
# shellcheck disable=SC2086
run fit $COMMON --trainer.precision bf16-mixed --trainer.default_root_dir "$OUT/bf16"

echo "3. synchronised batch norm, channels_last and torch.compile on GPUs"
if [ "$GPUS" -gt 1 ]; then
  # shellcheck disable=SC2086
  run fit $COMMON --trainer.sync_batchnorm true --model.execution Execution --model.execution.compile true \
    --trainer.default_root_dir "$OUT/gpu"
else
  echo "   skipped: fewer than two GPUs"
fi

echo "4. a checkpoint is scored and sampled by itself"
CHECKPOINT="$(find "$OUT/full" runs/biggan_smoke -name '*.ckpt' -newer "$0" 2>/dev/null | head -n 1)"
test -n "$CHECKPOINT"
run validate --config biggan_smoke --ckpt_path "$CHECKPOINT" --trainer.default_root_dir "$OUT/validate"
run predict --config biggan_smoke --ckpt_path "$CHECKPOINT" --trainer.default_root_dir "$OUT/predict"
test -n "$(find "$OUT/predict/samples" -name '*.png' | head -n 1)"

if [ "$#" -gt 0 ]; then
  echo "5. 50 updates of the full configuration on CIFAR-10 in $1"
  run fit --config biggan_cifar10 --config "biggan_cifar10_$([ "$GPUS" -gt 1 ] && echo 2 || echo 1)gpu" \
    --data.init_args.root "$1" --trainer.max_steps 50 --trainer.limit_val_batches 0 \
    --trainer.default_root_dir "$OUT/cifar10"
fi
echo "All checks passed; files in $OUT"
