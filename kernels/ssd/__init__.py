"""Mamba-2's state-space scan (SSD)."""

from .op import SSDInFlight, ssd, start_ssd
from .operands import count_maps
from .reference import ssd_sequential
