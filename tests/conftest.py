"""Shared set-up: the helpers beside this file are importable, two threads, and never a network."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(2)
