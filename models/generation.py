"""Generation with recurrent state: a model reads prompts in chunks, and then a token at a time, in constant time but for attention.

    room = max(ids.shape[1] for ids in prompts) + 100
    states = [read(model, ids, new_state(model, room)) for ids in prompts]            ids [1, l]
    batch = join(states, room)
    for ids in generate(model, batch, 100, greedy): ...                               ids [b]

Rows of a batch may have different lengths; each gets what it gets alone, but for what chance draws.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.layout import Layout
from ..parallel.mesh import Mesh
from .hybrid import HybridModel
from .mixers.short_conv import ShortConv
from .mixers.state import KVCache, RecurrentState, State, joined, restored

CHUNK = 8192
"""Tokens of a prompt that are in memory at a time, beside what the state keeps of all."""
SHORTEST_SEGMENT = 16
"""Tokens that a segment of a sharded prompt has at least; more where a convolution reaches back further."""

Choose = Callable[[Tensor], Tensor]
"""Logits [b, vocab] -> ids [b] int64."""


@dataclasses.dataclass
class GenerationState:
    """What a model knows of the tokens so far of b sequences."""

    layers: dict[str, State]
    lengths: Tensor
    """[b] int64: tokens so far."""
    logits: Tensor | None = None
    """[b, vocab], of each sequence's next token."""

    @property
    def recurrent_bytes(self) -> int:
        """Of Mamba layers."""
        return sum(state.bytes for state in self.layers.values() if isinstance(state, RecurrentState))

    @property
    def cache_bytes(self) -> int:
        """Of attention layers, of the longest sequence for each; room that is still empty is not counted."""
        return sum(state.bytes for state in self.layers.values() if isinstance(state, KVCache))

    def tensors(self) -> dict[str, Tensor]:
        """By name, all but the lengths: what `restore` takes. Raises ValueError where sequences have different lengths."""
        inside = {f"layers.{name}.{key}": t for name, state in self.layers.items() for key, t in state.tensors().items()}
        return inside | ({} if self.logits is None else {"logits": self.logits})


def new_state(model: HybridModel, room: int) -> GenerationState:
    """Of one sequence before its first token, on the model's device; room: tokens that it will have at most."""
    kinds = {name: layer.kinds.mixer for name, layer in model.layers.items()}
    layers: dict[str, State] = {name: KVCache(room) if kind == "attention" else RecurrentState() for name, kind in kinds.items()}
    device = next(model.parameters()).device
    return GenerationState(layers, torch.zeros(1, dtype=torch.int64, device=device))


def restore(tensors: dict[str, Tensor], length: int, room: int) -> GenerationState:
    """A state of its own, as that which `GenerationState.tensors` was of, after so many tokens; room: as `new_state`."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("layers."):
            _, layer, key = name.split(".")
            layers.setdefault(layer, {})[key] = tensor
    states = {name: restored(own, room) for name, own in layers.items()}
    some = next(iter(tensors.values()))
    lengths = torch.full((len(some),), length, dtype=torch.int64, device=some.device)
    return GenerationState(states, lengths, tensors.get("logits"))


def join(states: Sequence[GenerationState], room: int) -> GenerationState:
    """One batch of several sequences, with room for so many tokens each; uses the states up, so that no cache is there twice."""
    layers = {name: joined([state.layers.pop(name) for state in states], room) for name in list(states[0].layers)}
    logits = [state.logits for state in states if state.logits is not None]
    return GenerationState(layers, torch.cat([state.lengths for state in states]), torch.cat(logits))


@torch.no_grad()
def read(model: HybridModel, ids: Tensor, state: GenerationState, chunk: int = CHUNK) -> GenerationState:
    """The state, which goes on by the tokens ids [b, l], l > 0, of which so many are in work at a time.

    Raises ValueError where a cache has no room for them; the state is then as it was.
    """
    chunk = min(chunk, ids.shape[1])
    for layer in state.layers.values():
        if isinstance(layer, KVCache):
            layer.check(ids.shape[1], chunk)
    for part in ids.split(chunk, 1):
        positions = state.lengths[:, None] + torch.arange(part.shape[1], device=ids.device)
        logits = model(part, None, positions, states=state.layers)
        state.logits = logits[:, 0]
        state.lengths += part.shape[1]
    return state


def generate(model: HybridModel, state: GenerationState, count: int, choose: Choose) -> Iterator[Tensor]:
    """The next tokens of each sequence, one [b] after another, `count` at most; the state goes on by all but the last."""
    for left in range(count, 0, -1):
        assert state.logits is not None
        ids = choose(state.logits)
        yield ids
        if left > 1:
            read(model, ids[:, None], state)


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each sequence."""
    return logits.argmax(-1)


class Sampler:
    """Tokens at random: of the most likely that are together top_p likely, at a temperature (Holtzman et al., arXiv 1904.09751)."""

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        """temperature: logits are divided by it, more than 0. top_p: more than 0, 1: all tokens."""
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [b, vocab] -> ids [b]. Drawn on the host, so that a seed means the same on every device."""
        logits64 = logits.double().cpu()
        # From the largest: divided by a small temperature, none becomes infinite.
        probabilities = ((logits64 - logits64.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        likely, order = probabilities.sort(stable=True, dim=-1, descending=True)
        likely[likely.cumsum(-1) - likely >= self.top_p] = 0
        drawn = torch.multinomial(likely, 1, generator=self.generator)
        return order.gather(-1, drawn)[:, 0].to(logits.device)


@torch.no_grad()
def read_sharded(model: HybridModel, ids: Tensor, state: GenerationState, layout: Layout, mesh: Mesh) -> int:
    """Reads the first tokens of ids [1, l] over cp, whose model `shard_sequence` has wired, into a new state -> how many.

    All ranks call it. Afterwards the state is complete on the rank of cp that holds the sequence's end, 0 with the zigzag layout;
    the tokens after those, fewer than the layout has segments or all of a short prompt, are that rank's to `read`.
    """
    segments = len(layout.owners)
    length = ids.shape[1] - ids.shape[1] % segments
    reach = max((module.reach for module in model.modules() if isinstance(module, ShortConv)), default=0)
    if length < segments * max(SHORTEST_SEGMENT, reach):
        return 0
    own = layout.positions(mesh.rank("cp"), length, ids.device)
    parts = {name: KVCache(len(own)) if isinstance(layer, KVCache) else layer for name, layer in state.layers.items()}
    logits = model(ids[:, own], None, own, states=parts)
    state.logits = logits[:, 0]
    state.lengths += length
    for name, layer in state.layers.items():
        if isinstance(layer, KVCache):
            _gather(parts.pop(name), layer, layout, mesh)
    return length


def _gather(part: State, whole: KVCache, layout: Layout, mesh: Mesh) -> None:
    """All ranks' keys and values into the cache of the rank that holds the sequence's end, in any order: what follows sees all."""
    last = layout.owners[-1]
    gathered = []
    for own in part.tensors().values():
        pieces = [torch.empty_like(own) for _ in range(layout.ranks)] if mesh.rank("cp") == last else None
        dist.gather(own, pieces, group=mesh.group("cp"), group_dst=last)
        gathered.append(pieces or [])
    for k, v in zip(*gathered, strict=True):
        whole.append(k.transpose(1, 2), v.transpose(1, 2))
