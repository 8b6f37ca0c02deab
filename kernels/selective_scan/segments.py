"""How many tokens of the selective scan make one map of the state."""

import math

CHUNK = 32
"""Tokens of a map of the reference."""
MAIN_CHANNELS = 64
"""Of a program of the Triton kernel that computes the gradients."""
# Enough for every processor of a GPU to have as many as its registers allow, so that short sequences are cut finer.
PROGRAMS = 4096
SHORTEST_SEGMENT, LONGEST_SEGMENT = 64, 512


def segment_length(tokens: int, channels: int) -> int:
    """Tokens that the Triton kernels fold into one map, of `tokens` in all runs of all sequences."""
    programs = tokens * math.ceil(channels / MAIN_CHANNELS) // PROGRAMS
    return min(max(1 << max(programs.bit_length() - 1, 0), SHORTEST_SEGMENT), LONGEST_SEGMENT)


def count_maps(b: int, l: int, channels: int, runs: int, fused: bool) -> int:
    """Maps of each of b sequences of l tokens, whose states a call keeps for backward."""
    return runs * math.ceil(l // runs / (segment_length(b * l, channels) if fused else CHUNK))
