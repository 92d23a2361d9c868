#!/usr/bin/env bash
# Lightweight fine-tuning (MPOP): a lossless MPO of which the auxiliary cores alone are trained, beside plain
# fine-tuning of the same model. Options after OUTPUT_DIRECTORY go to both runs of finetune; LENGTH (tokens) is the
# environment's.
#   bash recipes/finetune.sh MODEL TASK TRAIN DEV [OUTPUT_DIRECTORY] [--epochs 2 --lr 2e-4 …]
set -euo pipefail
model=$1 task=$2 train=$3 dev=$4
out=${5:-finetune-$(basename "$model")}
data=(--task "$task" --eval "$dev" --max-length "${LENGTH:-128}")
options=("${data[@]}" --train "$train" "${@:6}")

mpocli decompose "$model" -o "$out/mpo" --overwrite
mpocli finetune "$out/mpo" "${options[@]}" -o "$out/auxiliary" --overwrite
mpocli finetune "$model" "${options[@]}" -o "$out/dense" --overwrite
mpocli eval "$out/auxiliary" "${data[@]}" --baseline "$out/dense" --predictions "$out/dev.jsonl"
# Trained small, deployed as an ordinary checkpoint.
mpocli merge "$out/auxiliary" -o "$out/merged" --overwrite
