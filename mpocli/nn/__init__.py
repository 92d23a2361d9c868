"""Torch modules whose weights are MPOs; no transformers."""

from mpocli.nn.cores import TOMBSTONE, MPOModule, Update
from mpocli.nn.embedding import MPOEmbedding
from mpocli.nn.linear import MPOLinear

__all__ = ["TOMBSTONE", "MPOEmbedding", "MPOLinear", "MPOModule", "Update"]
