"""RMS norms: the plain one, one that adds to the residual first, and Mamba-2's gated one over groups of channels."""

from .op import add_rms_norm, gated_group_rms_norm, rms_norm
