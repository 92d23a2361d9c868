#!/usr/bin/env bash
# Lightweight fine-tuning (MPOP): a lossless MPO of which the auxiliary cores alone are trained, beside plain
# fine-tuning of the same model. Options after OUTPUT_DIRECTORY go to both runs of finetune.
#   bash recipes/finetune.sh MODEL TASK TRAIN DEV [OUTPUT_DIRECTORY] [--epochs 2 --lr 2e-4 …]
set -euo pipefail
model=$1 task=$2 train=$3 dev=$4
out=${5:-finetune-$(basename "$model")}
options=("${@:6}")

mpocli decompose "$model" -o "$out/mpo" --overwrite
mpocli finetune "$out/mpo" --task "$task" --train "$train" --eval "$dev" -o "$out/auxiliary" --overwrite "${options[@]}"
mpocli finetune "$model" --task "$task" --train "$train" --eval "$dev" -o "$out/dense" --overwrite "${options[@]}"
mpocli eval "$out/auxiliary" --task "$task" --eval "$dev" --baseline "$out/dense" --predictions "$out/dev.jsonl"
# Trained small, deployed as an ordinary checkpoint.
mpocli merge "$out/auxiliary" -o "$out/merged" --overwrite
