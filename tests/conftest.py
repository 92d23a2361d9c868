"""Shared set-up: the helpers beside this file are importable, one thread for each worker, and never a network."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
