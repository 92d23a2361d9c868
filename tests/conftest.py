"""Shared set-up: the helpers beside this file are importable, one thread in every process, and never a network."""

import gc
import os
import signal
import sys
from pathlib import Path

# Before anything imports huggingface_hub and torch, which read them once. Neither is imported here: the process that
# only hands out the tests needs none.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # a second thread would mostly wait, and spin while it does
sys.path.insert(0, str(Path(__file__).parent))

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup pytest` would have every process of the tests ignore it

os.fsync = lambda descriptor: None  # the disk is waited for thousands of times; io/test_output holds what is synced

_frozen_at = 0  # so many modules were imported


def pytest_runtest_setup() -> None:
    """What imports leave is kept out of every later collection: accelerate asks for one in each training, and
    would look through half a million objects that stay for ever."""
    global _frozen_at
    if len(sys.modules) > _frozen_at + 100:
        gc.collect()
        gc.freeze()
        _frozen_at = len(sys.modules)
