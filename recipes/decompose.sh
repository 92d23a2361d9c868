#!/usr/bin/env bash
# Decompose a model under one cap, look at it, check every claim, and contract it back.
#   bash recipes/decompose.sh [MODEL] [CAP] [OUTPUT_DIRECTORY]
set -euo pipefail
model=${1:-bert-base-uncased}
cap=${2:-256}
out=${3:-decompose-$(basename "$model")}

mpocli decompose "$model" --trunc "$cap" --dry-run
mpocli decompose "$model" --trunc "$cap" -o "$out/mpo" --overwrite
mpocli inspect "$out/mpo" --verify --base "$model"
mpocli merge "$out/mpo" -o "$out/dense" --overwrite
mpocli inspect "$out/dense"
