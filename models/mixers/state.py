"""What mixers know of the tokens so far, for generation: made by the first ones, and changed in place by those that follow."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.attention import continued_attention


class RecurrentState:
    """Of a short convolution and the recurrence behind it: of one size however many tokens there were."""

    def __init__(self) -> None:
        self.tail: Tensor | None = None
        """[b, w - 1, c], the convolution's last inputs."""
        self.ssm: Tensor | None = None
        """[b, ...] in fp32 at least; on ranks of a sharded sequence None but where that ends."""

    def keep(self, name: str, value: Tensor) -> None:
        """The tail or the ssm's state after more tokens."""
        held = getattr(self, name)
        if held is None:
            setattr(self, name, value)
        elif held is not value:
            held.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """By name what there is."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @property
    def bytes(self) -> int:
        """That it takes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


class KVCache:
    """Keys and values of attention, with room for tokens to come; rows of a batch may have different lengths."""

    def __init__(self, room: int) -> None:
        """room: tokens of each sequence."""
        self.room = room
        self.keys: Tensor | None = None
        """[b, heads, room, e], as `values`."""
        self.values: Tensor | None = None
        self.lengths: Tensor | None = None
        """[b] int64 on the device, where rows differ: they lie between the two that follow."""
        self.shortest = self.longest = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        """The keys and values [b, l, heads, e] of the next tokens, of which there is one where rows have different lengths.

        Raises ValueError as `check`.
        """
        b, l, heads, e = k.shape
        self.check(l, l)
        if self.keys is None:
            self.keys, self.values = (t.new_empty(b, heads, self.room, e) for t in (k, v))
        for cache, new in ((self.keys, k), (self.values, v)):
            assert cache is not None
            if self.lengths is None:
                cache[:, :, self.longest : self.longest + l] = new.transpose(1, 2)
            else:
                cache[torch.arange(b, device=k.device), :, self.lengths] = new.squeeze(1)
        if self.lengths is not None:
            self.lengths += l
        self.shortest, self.longest = self.shortest + l, self.longest + l

    def check(self, more: int, together: int) -> None:
        """Raises ValueError where there is no room for more tokens, or rows of different lengths would get several together."""
        if self.longest + more > self.room:
            raise ValueError(f"{self.longest} and {more} more tokens in a cache with room for {self.room}")
        if self.lengths is not None and together > 1:
            raise ValueError(f"{together} tokens for rows of different lengths, allowed: one at a time")

    def attend(self, q: Tensor) -> Tensor:
        """Causal attention of the last tokens, q [b, l, h, e] with rows of one length or l = 1 -> [b, l, h, e]."""
        assert self.keys is not None
        assert self.values is not None
        k, v = (t[:, :, : self.longest] for t in (self.keys, self.values))
        if q.shape[1] > 1:
            return continued_attention(q, k.transpose(1, 2), v.transpose(1, 2))
        seen = None
        if self.lengths is not None:
            seen = (torch.arange(self.longest, device=q.device) < self.lengths[:, None])[:, None, None]
        # The queries of one key's head are as many tokens to the kernel, so that no key is copied for each of them.
        return F.scaled_dot_product_attention(q.squeeze(1).unflatten(1, (k.shape[1], -1)), k, v, seen).flatten(1, 2)[:, None]

    def tensors(self) -> dict[str, Tensor]:
        """By name what there is. Raises ValueError for rows of different lengths."""
        if self.lengths is not None:
            raise ValueError("rows of different lengths are not kept; allowed: each row's state before they were joined")
        return {name: t[:, :, : self.longest] for name, t in (("keys", self.keys), ("values", self.values)) if t is not None}

    @property
    def bytes(self) -> int:
        """That the longest row takes, of each row."""
        return sum(t.nbytes // self.room * self.longest for t in (self.keys, self.values) if t is not None)


State = RecurrentState | KVCache


class Stepped(NamedTuple):
    """One token's output of a recurrence and the state after it, as a scan in flight gives them."""

    y: Tensor
    state: Tensor

    def finish(self) -> tuple[Tensor, Tensor]:
        """Both."""
        return self


def restored(tensors: dict[str, Tensor], room: int) -> State:
    """A state of its own, as that which `tensors()` was of; a cache with room for so many tokens."""
    if "keys" not in tensors:
        state = RecurrentState()
        for name, tensor in tensors.items():
            state.keep(name, tensor.clone())
        return state
    cache = KVCache(room)
    cache.append(tensors["keys"].transpose(1, 2), tensors["values"].transpose(1, 2))
    return cache


def joined(states: Sequence[State], room: int) -> State:
    """The states of several batches as one batch; of caches whose rows have one length in each, with room for so many tokens."""
    tensors = [state.tensors() for state in states]
    if isinstance(states[0], RecurrentState):
        return restored({name: torch.cat([each[name] for each in tensors]) for name in tensors[0]}, room)
    cache, rows = KVCache(room), sum(len(each["keys"]) for each in tensors)
    # Zeros: what a row does not see has no weight, but no weight times what is not finite is not finite.
    cache.keys, cache.values = (
        tensors[0][name].new_zeros(rows, tensors[0][name].shape[1], room, tensors[0][name].shape[3]) for name in ("keys", "values")
    )
    lengths: list[int] = []
    for each in tensors:
        own, length = slice(len(lengths), len(lengths) + len(each["keys"])), each["keys"].shape[2]
        cache.keys[own, :, :length] = each["keys"]
        cache.values[own, :, :length] = each["values"]
        lengths += [length] * len(each["keys"])
    cache.shortest, cache.longest = min(lengths), max(lengths)
    if cache.shortest < cache.longest:
        cache.lengths = torch.tensor(lengths, device=cache.keys.device)
    return cache
