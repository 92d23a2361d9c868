#!/usr/bin/env bash
# Mixture of experts that share their central cores (MPOE), beside dense experts and the plain model, all trained alike.
# Options after OUTPUT_DIRECTORY go to every run of finetune; LENGTH (tokens) is the environment's.
#   bash recipes/moe.sh MODEL TASK TRAIN DEV [EXPERTS] [OUTPUT_DIRECTORY] [--steps 500 …]
set -euo pipefail
model=$1 task=$2 train=$3 dev=$4 experts=${5:-8}
out=${6:-moe-$(basename "$model")}
data=(--task "$task" --eval "$dev" --max-length "${LENGTH:-128}")
options=("${data[@]}" --train "$train" "${@:7}")

mpocli expand-moe "$model" --experts "$experts" -o "$out/start" --overwrite
mpocli expand-moe "$model" --experts "$experts" --baseline-moe -o "$out/dense-start" --overwrite
mpocli finetune "$model" "${options[@]}" -o "$out/plain" --overwrite
mpocli finetune "$out/start" "${options[@]}" -o "$out/experts" --overwrite
mpocli finetune "$out/dense-start" "${options[@]}" -o "$out/dense-experts" --overwrite
mpocli eval "$out/experts" "${data[@]}" --baseline "$out/plain"
mpocli inspect "$out/experts"
