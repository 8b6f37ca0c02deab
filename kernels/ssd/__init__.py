"""Mamba-2's state-space scan (SSD)."""

from .op import ssd
from .reference import ssd_sequential
