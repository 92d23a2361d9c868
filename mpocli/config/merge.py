"""Options of `mpocli merge`."""

from __future__ import annotations

from dataclasses import dataclass

from mpocli.config import common


@dataclass(frozen=True)
class MergeConfig:
    """How dense weights are stored."""

    dtype: common.StoredDType = None
    max_shard_bytes: common.ShardBytes = 5 * 10**9
    revision: common.Revision = None
    trust_remote_code: common.TrustRemoteCode = False
