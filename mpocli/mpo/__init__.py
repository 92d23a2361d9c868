"""Numerics of matrix product operators: torch and the standard library only."""

from typing import TYPE_CHECKING

from mpocli.lazy import attributes

if TYPE_CHECKING:
    from mpocli.mpo.canonical import canonical_defect, canonicalize, compress, symmetric_gauge
    from mpocli.mpo.contract import apply_chain, chain_macs, choose_path, rebuild_macs, to_dense
    from mpocli.mpo.factorize import site_shape
    from mpocli.mpo.from_matrix import decompose, stored_error
    from mpocli.mpo.gradient import core_gradients
    from mpocli.mpo.mpo import MPO
    from mpocli.mpo.projectors import BondCut, cut_bond, inner_bonds_of_centre
    from mpocli.mpo.shape import SiteShape
    from mpocli.mpo.spectrum import bond_spectra, entropy_nats, error_bounds, norm_squared
    from mpocli.mpo.truncation import Truncation, TruncationError

__all__ = [
    "MPO",
    "BondCut",
    "SiteShape",
    "Truncation",
    "TruncationError",
    "apply_chain",
    "bond_spectra",
    "canonical_defect",
    "canonicalize",
    "chain_macs",
    "choose_path",
    "compress",
    "core_gradients",
    "cut_bond",
    "decompose",
    "entropy_nats",
    "error_bounds",
    "inner_bonds_of_centre",
    "norm_squared",
    "rebuild_macs",
    "site_shape",
    "stored_error",
    "symmetric_gauge",
    "to_dense",
]

# `shape` is for whoever reads about cores and needs no torch for it.
__getattr__ = attributes(
    __name__,
    {
        "canonical": "canonical_defect canonicalize compress symmetric_gauge",
        "contract": "apply_chain chain_macs choose_path rebuild_macs to_dense",
        "factorize": "site_shape",
        "from_matrix": "decompose stored_error",
        "gradient": "core_gradients",
        "mpo": "MPO",
        "projectors": "BondCut cut_bond inner_bonds_of_centre",
        "shape": "SiteShape",
        "spectrum": "bond_spectra entropy_nats error_bounds norm_squared",
        "truncation": "Truncation TruncationError",
    },
)
