"""Torch modules whose weights are MPOs, and tensors that stay packed in memory; no transformers."""

from mpocli.config.routing import RouterOptions
from mpocli.nn.cores import TOMBSTONE, MPOModule, Update
from mpocli.nn.dense_experts import DenseExperts
from mpocli.nn.dispatch import attach_router
from mpocli.nn.embedding import MPOEmbedding
from mpocli.nn.experts import MPOExperts
from mpocli.nn.linear import MPOLinear
from mpocli.nn.router import Router, Shared

__all__ = [
    "TOMBSTONE",
    "DenseExperts",
    "MPOEmbedding",
    "MPOExperts",
    "MPOLinear",
    "MPOModule",
    "Router",
    "RouterOptions",
    "Shared",
    "Update",
    "attach_router",
]
