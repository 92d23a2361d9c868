#!/usr/bin/env bash
# The best model for a number of bytes: bits and bonds chosen together on the model's own text, what is left in floating
# point healed, and the result gated (exit 5 where perplexity has risen by more than MOST). Options after
# OUTPUT_DIRECTORY go to finetune; LENGTH (tokens) and MOST are the environment's.
#   bash recipes/quantize.sh MODEL TRAIN_TEXT DEV_TEXT [SHARE_OF_BYTES] [OUTPUT_DIRECTORY] [--steps 200 …]
set -euo pipefail
model=$1 train=$2 dev=$3 share=${4:-0.1}
out=${5:-quantize-$(basename "$model")}
length=${LENGTH:-256}
budget=(--ratio-bytes "$share" --bits auto --layers attention,ffn --calibrate "$train" --seq-len "$length")
data=(--task lm --eval "$dev" --max-length "$length")

mpocli plan "$model" "${budget[@]}"
mpocli decompose "$model" "${budget[@]}" -o "$out/planned" --overwrite
mpocli inspect "$out/planned" --verify
# Codes stay as they are: norms, biases and embeddings learn to live with them.
mpocli finetune "$out/planned" "${data[@]}" --train "$train" --update all "${@:6}" -o "$out/healed" --overwrite
mpocli eval "$out/healed" "${data[@]}" --baseline "$model" --max-drop "perplexity=${MOST:-5}"
