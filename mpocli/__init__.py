"""mpocli: compress pretrained language models with matrix product operators.

After `import mpocli`, transformers' `from_pretrained` loads MPO checkpoints. Neither torch nor transformers is
imported here; public names are resolved on first use.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpocli.errors import InputError, MpoError, NumericsError, TargetNotMetError, UsageError
    from mpocli.hf.memory import keep_packed
    from mpocli.hf.packing import release_zeros
    from mpocli.hf.plugin import MPOConfig
    from mpocli.mpo import MPO, SiteShape, Truncation
    from mpocli.nn import MPOEmbedding, MPOLinear

_PUBLIC = {
    "MPO": "mpocli.mpo",
    "SiteShape": "mpocli.mpo",
    "Truncation": "mpocli.mpo",
    "MPOLinear": "mpocli.nn",
    "MPOEmbedding": "mpocli.nn",
    "MPOConfig": "mpocli.hf.plugin",
    "keep_packed": "mpocli.hf.memory",
    "release_zeros": "mpocli.hf.packing",
    "MpoError": "mpocli.errors",
    "UsageError": "mpocli.errors",
    "InputError": "mpocli.errors",
    "NumericsError": "mpocli.errors",
    "TargetNotMetError": "mpocli.errors",
}
__all__ = [
    "MPO",
    "InputError",
    "MPOConfig",
    "MPOEmbedding",
    "MPOLinear",
    "MpoError",
    "NumericsError",
    "SiteShape",
    "TargetNotMetError",
    "Truncation",
    "UsageError",
    "keep_packed",
    "release_zeros",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# --- registering the loader -------------------------------------------------------------------------------------

_HOOKED = "transformers.quantizers.auto"
_PLUGIN = "mpocli.hf.plugin"


class _RegisterAfter(Loader):
    """Loads transformers' registry of storage formats as usual, then adds ours to it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(_PLUGIN)


class _OneShotFinder(MetaPathFinder):
    """Waits for that one module, steps aside, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _HOOKED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


if _HOOKED in sys.modules:
    importlib.import_module(_PLUGIN)
else:
    import importlib.util

    sys.meta_path.insert(0, _OneShotFinder())
