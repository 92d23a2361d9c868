#!/usr/bin/env bash
# Over-parameterised fine-tuning (OPF) beside plain fine-tuning, both of the same size in the end: SVD factors of all
# matrices, the matrices that a fine-tuned model needs most, those that training finds, and the sceptic's arm, in which
# the same matrices stay dense and only learn faster. Options after OUTPUT_DIRECTORY go to every run; LENGTH (tokens)
# and RAISED (the sceptic's rate) are the environment's.
#   bash recipes/overparam.sh MODEL TASK TRAIN DEV [OUTPUT_DIRECTORY] [--lr 1e-4 --epochs 3 …]
set -euo pipefail
model=$1 task=$2 train=$3 dev=$4
out=${5:-overparam-$(basename "$model")}
data=(--task "$task" --eval "$dev" --max-length "${LENGTH:-128}")
options=("${data[@]}" --train "$train" "${@:6}")

mpocli finetune "$model" "${options[@]}" -o "$out/plain" --overwrite
mpocli finetune "$model" "${options[@]}" --overparam none --mpo-lr "${RAISED:-4e-4}" -o "$out/raised" --overwrite
for method in svd static dynamic; do
  [ "$method" = svd ] && chosen=() || chosen=(--top-n 4)  # svd takes all matrices
  mpocli finetune "$model" "${options[@]}" --overparam "$method" "${chosen[@]}" -o "$out/$method" --overwrite
  mpocli eval "$out/$method" "${data[@]}" --baseline "$out/plain"
done
