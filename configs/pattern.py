"""The pattern string: one letter a sub-layer. A mixer's letter begins a layer, a feed-forward's letter may follow it."""

from typing import NamedTuple

MIXERS = {"M": "mamba2", "*": "attention"}
FEED_FORWARDS = {"-": "mlp", "E": "moe"}


class LayerKinds(NamedTuple):
    """What a layer is made of, by the names of MIXERS and FEED_FORWARDS."""

    mixer: str
    feed_forward: str | None


def parse_pattern(pattern: str) -> list[LayerKinds]:
    """`M-MEM-*E` -> four layers. Raises ValueError, naming the letter and its place."""
    layers: list[LayerKinds] = []
    for place, letter in enumerate(pattern, 1):
        if letter in MIXERS:
            layers.append(LayerKinds(MIXERS[letter], None))
        elif letter in FEED_FORWARDS:
            if not layers or layers[-1].feed_forward is not None:
                raise ValueError(f"letter {place} of {pattern!r}, {letter!r}, must follow a mixer ({_letters(MIXERS)})")
            layers[-1] = layers[-1]._replace(feed_forward=FEED_FORWARDS[letter])
        else:
            raise ValueError(f"letter {place} of {pattern!r}, {letter!r}, is none of {_letters(MIXERS | FEED_FORWARDS)}")
    if not layers:
        raise ValueError(f"no layer; allowed: letters of {_letters(MIXERS | FEED_FORWARDS)}")
    return layers


def _letters(names: dict[str, str]) -> str:
    return ", ".join(f"{letter} {name}" for letter, name in names.items())
