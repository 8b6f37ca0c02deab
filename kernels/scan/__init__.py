"""Exclusive scan of affine maps: how every recurrence passes its state on."""

from .op import Done, LocalScan, Pending, Scan, affine_scan, exclusive_scan, fold, without_memory
from .transitions import SCALAR, Decay, Dense, Transition
