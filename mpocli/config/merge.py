"""Options of `mpocli merge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from mpocli.config import common
from mpocli.config.option import recorded


@dataclass(frozen=True)
class MergeConfig:
    """How dense weights are stored."""

    dtype: common.StoredDType = None
    max_shard_bytes: Annotated[common.ShardBytes, {"recorded": False}] = 5 * 10**9
    revision: common.Revision = None
    trust_remote_code: common.TrustRemoteCode = False

    def recorded(self) -> dict[str, Any]:
        """The options for the manifest."""
        return recorded(self)
