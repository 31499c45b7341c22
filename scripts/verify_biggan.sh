#!/bin/sh
# Checks BigGAN on this machine in about ten minutes: processes, mixed precision, resuming, scores.
# Uses the GPUs if there are any, and two CPU processes otherwise. Arguments: [folder of cifar-10-batches-py]
set -eu
PYTHON="${PYTHON:-python}"
OUT="$(mktemp -d)"
GPUS="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
if [ "$GPUS" -gt 0 ]; then ACCELERATOR=gpu; else ACCELERATOR=cpu; fi
if [ "$GPUS" -eq 1 ]; then DEVICES=1; STRATEGY=auto; else DEVICES=2; STRATEGY=ddp; fi

# run NAME COMMAND OPTIONS...: everything it writes goes to $OUT/NAME
run() {
  name="$1"; shift
  echo "== $name: $*"
  "$PYTHON" -m lightning_nested "$@" --trainer.enable_progress_bar false --trainer.enable_model_summary false \
    --trainer.default_root_dir "$OUT/$name" --trainer.logger CSVLogger --trainer.logger.save_dir "$OUT/$name"
}
# fit NAME OPTIONS...: the smoke configuration on these devices
fit() {
  name="$1"; shift
  run "$name" fit --config biggan_smoke --trainer.accelerator "$ACCELERATOR" --trainer.devices "$DEVICES" \
    --trainer.strategy "$STRATEGY" "$@"
}
checkpoint() { find "$OUT/$1" -name '*.ckpt' | head -n 1; }

echo "1. processes and scores: $DEVICES on $ACCELERATOR"
fit full
test -s "$OUT/full/scores.jsonl"
test -s "$OUT/full/grids/000020.png"

echo "2. resuming: 5 updates more, the average among what is read"
fit resumed --ckpt_path "$(checkpoint full)" --trainer.max_steps 25
test -s "$OUT/resumed/grids/000025.png"

echo "3. mixed precision, with a penalty and augmentation"
fit bf16 --trainer.precision bf16-mixed --model.objective BigGANObjective --model.objective.augment DiffAugment \
  --model.objective.regularizers '[{class_path: R1, init_args: {weight: 0.1, every: 16}}]'

echo "4. synchronised batch norm, channels_last and torch.compile on GPUs"
if [ "$GPUS" -gt 1 ]; then
  fit gpu --trainer.sync_batchnorm true --model.execution Execution --model.execution.compile true
else
  echo "   skipped: fewer than two GPUs"
fi

echo "5. a checkpoint is scored and sampled by itself"
run validate validate --config biggan_smoke --ckpt_path "$(checkpoint full)"
test -s "$OUT/validate/scores.jsonl"
run predict predict --config biggan_smoke --ckpt_path "$(checkpoint full)"
test "$(find "$OUT/predict/samples" -name '*.png' | wc -l)" -eq 100

if [ "$#" -gt 0 ]; then
  echo "6. 50 updates of the full configuration on CIFAR-10 in $1"
  run cifar10 fit --config biggan_cifar10 --config "biggan_cifar10_$([ "$GPUS" -gt 1 ] && echo 2 || echo 1)gpu" \
    --data.root "$1" --trainer.max_steps 50 --trainer.limit_val_batches 0 --trainer.log_every_n_steps 10
  echo "   images per second, in the last column but one or so of:"
  find "$OUT/cifar10" -name metrics.csv
fi
echo "All checks passed; files in $OUT"
