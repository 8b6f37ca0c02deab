"""Mamba-1's selective scan."""

from .op import SelectiveScanInFlight, selective_scan, start_selective_scan
from .reference import selective_scan_sequential
from .segments import count_maps
