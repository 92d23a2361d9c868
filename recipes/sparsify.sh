#!/usr/bin/env bash
# Sparse training (PST) at the end of the chain: lossless MPO, fine-tuned, its central cores pruned, and beside it the
# dense model trained sparse and one pruned at once. Options after OUTPUT_DIRECTORY go to every command that trains;
# LENGTH (tokens) and SCORE_LR are the environment's.
#   bash recipes/sparsify.sh MODEL TASK TRAIN DEV [SPARSITY] [OUTPUT_DIRECTORY] [--epochs 2 …]
set -euo pipefail
model=$1 task=$2 train=$3 dev=$4 sparsity=${5:-0.9}
out=${6:-sparsify-$(basename "$model")}
data=(--task "$task" --eval "$dev" --max-length "${LENGTH:-128}")
options=("${data[@]}" --train "$train" "${@:7}")
scores=(${SCORE_LR:+--score-lr "$SCORE_LR"})

mpocli decompose "$model" -o "$out/mpo" --overwrite
mpocli finetune "$out/mpo" "${options[@]}" -o "$out/tuned" --overwrite
mpocli sparsify "$out/tuned" --sparsity "$sparsity" "${options[@]}" "${scores[@]}" -o "$out/mpo-sparse" --overwrite
mpocli eval "$out/mpo-sparse" "${data[@]}" --baseline "$out/tuned"
mpocli sparsify "$model" --sparsity "$sparsity" "${options[@]}" "${scores[@]}" -o "$out/sparse" --overwrite
mpocli sparsify "$out/tuned" --method wanda --sparsity "$sparsity" "${data[@]}" --calibrate "$train" \
  -o "$out/wanda" --overwrite
mpocli inspect "$out/sparse"
# An ordinary checkpoint with zeros, for tools that know no bitmask.
mpocli merge "$out/sparse" -o "$out/merged" --overwrite
