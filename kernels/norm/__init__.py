"""RMS norms: the plain one, and Mamba-2's gated one over groups of channels."""

from .op import gated_group_rms_norm, rms_norm
