#!/usr/bin/env bash
# Compress a model to a budget on its own text: look at the plan, compare it, make it, heal it, measure it.
# Options after OUTPUT_DIRECTORY go to finetune; LENGTH (tokens) is the environment's.
#   bash recipes/plan.sh MODEL TRAIN_TEXT DEV_TEXT [RATIO] [OUTPUT_DIRECTORY] [--steps 200 …]
set -euo pipefail
model=$1 train=$2 dev=$3 ratio=${4:-0.5}
out=${5:-plan-$(basename "$model")}
length=${LENGTH:-256}
budget=(--ratio "$ratio" --layers attention,ffn --calibrate "$train" --seq-len "$length")
data=(--task lm --eval "$dev" --max-length "$length")

mpocli plan "$model" "${budget[@]}" --compare
mpocli decompose "$model" "${budget[@]}" -o "$out/planned" --overwrite
mpocli eval "$out/planned" "${data[@]}" --baseline "$model"
mpocli finetune "$out/planned" "${data[@]}" --train "$train" --update all "${@:6}" -o "$out/healed" --overwrite
mpocli eval "$out/healed" "${data[@]}" --baseline "$model"
