"""The pattern string: one letter a sub-layer. A mixer's letter begins a layer, a feed-forward's letter may follow it.

Between layers `|` may stand, where a pipeline's stage ends and the next begins.
"""

import functools
import itertools
from typing import NamedTuple

MIXERS = {"M": "mamba2", "m": "mamba", "*": "attention"}
FEED_FORWARDS = {"-": "mlp", "E": "moe"}
RECURRENT = ("mamba2", "mamba")
"""Mixers that hand a state on from token to token."""
CUT = "|"


class LayerKinds(NamedTuple):
    """What a layer is made of, by the names of MIXERS and FEED_FORWARDS."""

    mixer: str
    feed_forward: str | None


@functools.lru_cache(64)
def parse_pattern(pattern: str) -> tuple[LayerKinds, ...]:
    """`M-MEM-*E` -> four layers, cuts left out. Raises ValueError, naming the letter and its place."""
    layers: list[LayerKinds] = []
    for place, letter in enumerate(pattern, 1):
        if letter == CUT:
            _check_cut(pattern, place)
            continue
        if letter in MIXERS:
            layers.append(LayerKinds(MIXERS[letter], None))
        elif letter in FEED_FORWARDS:
            if not layers or layers[-1].feed_forward is not None or pattern[place - 2] == CUT:
                raise ValueError(f"letter {place} of {pattern!r}, {letter!r}, must follow a mixer ({_letters(MIXERS)})")
            layers[-1] = layers[-1]._replace(feed_forward=FEED_FORWARDS[letter])
        else:
            raise ValueError(f"letter {place} of {pattern!r}, {letter!r}, is none of {_letters(MIXERS | FEED_FORWARDS)}, {CUT} cut")
    if not layers:
        raise ValueError(f"no layer; allowed: letters of {_letters(MIXERS | FEED_FORWARDS)}")
    return tuple(layers)


def repeats(kind: str, layer: LayerKinds, recompute: str) -> bool:
    """Whether backward computes this mixer or feed-forward of a layer again, as `parallel.recompute` says."""
    return recompute == "layer" or recompute == ("mixer" if kind == layer.mixer else "feed_forward")


def find_cuts(pattern: str) -> list[int]:
    """The numbers of the layers that begin after a cut; a cut after the last layer is none."""
    parts = pattern.split(CUT)
    starts = itertools.accumulate(sum(letter in MIXERS for letter in part) for part in parts[:-1])
    return [start for start in starts if start < sum(letter in MIXERS for letter in pattern)]


def _check_cut(pattern: str, place: int) -> None:
    if place == 1 or pattern[place - 2] == CUT:
        raise ValueError(f"letter {place} of {pattern!r}, {CUT!r}, cuts nothing; allowed: after a layer")


def _letters(names: dict[str, str]) -> str:
    return ", ".join(f"{letter} {name}" for letter, name in names.items())
