"""Generation with recurrent state: a model reads prompts in chunks, and then a token at a time, in constant time but for attention.

    states = [read(model, ids, new_state(model, room), CHUNK) for ids in prompts]     ids [1, l]
    batch = join(states, room)
    for ids in generate(model, batch, 100, greedy): ...                               ids [b]

Rows of a batch may have different lengths; each gets what it gets alone.
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
        """By name, of sequences of one length: what `restore` takes."""
        inside = {f"layers.{name}.{key}": t for name, state in self.layers.items() for key, t in state.tensors().items()}
        return inside | {"lengths": self.lengths} | ({} if self.logits is None else {"logits": self.logits})


def new_state(model: HybridModel, room: int) -> GenerationState:
    """Of one sequence before its first token, on the model's device; room: tokens that it will have at most."""
    kinds = {name: layer.kinds.mixer for name, layer in model.layers.items()}
    layers: dict[str, State] = {name: KVCache(room) if kind == "attention" else RecurrentState() for name, kind in kinds.items()}
    device = next(model.parameters()).device
    return GenerationState(layers, torch.zeros(1, dtype=torch.int64, device=device))


def restore(tensors: dict[str, Tensor], room: int) -> GenerationState:
    """A state of its own, as that which `GenerationState.tensors` was of; room: tokens that it will have at most."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("layers."):
            _, layer, key = name.split(".")
            layers.setdefault(layer, {})[key] = tensor
    states = {name: restored(own, room) for name, own in layers.items()}
    return GenerationState(states, tensors["lengths"].clone(), tensors.get("logits"))


def join(states: Sequence[GenerationState], room: int) -> GenerationState:
    """One batch of several sequences, with room for so many tokens each."""
    layers = {name: joined([state.layers[name] for state in states], room) for name in states[0].layers}
    logits = [state.logits for state in states if state.logits is not None]
    return GenerationState(layers, torch.cat([state.lengths for state in states]), torch.cat(logits))


@torch.no_grad()
def read(model: HybridModel, ids: Tensor, state: GenerationState, chunk: int = CHUNK) -> GenerationState:
    """The state, which goes on by the tokens ids [b, l], l > 0, of which so many are in work at a time."""
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
        probabilities = (logits.double().cpu() / self.temperature).softmax(-1)
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
    logits = model(ids[:, own], None, own, states=state.layers)
    state.logits = logits[:, 0]
    state.lengths += length
    for name, layer in state.layers.items():
        if isinstance(layer, KVCache):
            state.layers[name] = _gather(layer, layout, mesh)
    return length


def _gather(cache: KVCache, layout: Layout, mesh: Mesh) -> KVCache:
    """All ranks' keys and values on the rank that holds the sequence's end, in any order: what follows sees all; elsewhere none."""
    last, whole = layout.owners[-1], KVCache(cache.room)
    ends_here = mesh.rank("cp") == last
    gathered = []
    for own in cache.tensors().values():
        own = own.contiguous()
        pieces = [torch.empty_like(own) for _ in range(layout.ranks)] if ends_here else None
        dist.gather(own, pieces, group=mesh.group("cp"), group_dst=last)
        if pieces is not None:
            gathered.append(torch.cat(pieces, 2).transpose(1, 2))
    if ends_here:
        whole.append(*gathered)
    return whole
