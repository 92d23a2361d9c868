#!/usr/bin/env bash
# Dimension squeezing (MPOP): fine-tune a lossless MPO, shrink it bond by bond to a share of the dense parameters, and
# beside it the same size by truncating at once with as many steps of training. Options after OUTPUT_DIRECTORY go to
# every command that trains; ROUNDS (at most), STEPS (each) and LENGTH (tokens) are the environment's.
#   bash recipes/squeeze.sh MODEL TASK TRAIN DEV [RATIO] [OUTPUT_DIRECTORY] [--lr 2e-4 …]
set -euo pipefail
model=$1 task=$2 train=$3 dev=$4 ratio=${5:-0.6}
out=${6:-squeeze-$(basename "$model")}
data=(--task "$task" --eval "$dev" --max-length "${LENGTH:-128}")
options=("${data[@]}" --train "$train" "${@:7}")
rounds=${ROUNDS:-40} steps=${STEPS:-50}

mpocli decompose "$model" -o "$out/mpo" --overwrite
mpocli finetune "$out/mpo" "${options[@]}" -o "$out/tuned" --overwrite
how=(--target-ratio "$ratio" --tie kind --per-param --step 10%)
# Exit 5: not as small as asked for, and written all the same.
mpocli squeeze "$out/tuned" "${options[@]}" "${how[@]}" --rounds "$rounds" --finetune-steps "$steps" \
  -o "$out/squeezed" --plot "$out/squeezed.svg" --overwrite || [ $? -eq 5 ]
[ ! -f "$out/squeezed/squeeze.jsonl" ] || rounds=$(wc -l < "$out/squeezed/squeeze.jsonl")
mpocli squeeze "$out/tuned" "${options[@]}" "${how[@]}" --direct --finetune-steps "$((rounds * steps))" \
  -o "$out/direct" --overwrite
mpocli eval "$out/squeezed" "${data[@]}" --baseline "$out/direct"
mpocli inspect "$out/squeezed"
