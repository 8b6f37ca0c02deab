"""One run of `baton generate`: prompts are read, then all sequences go on together."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ...configs.errors import UserError
from ...models.generation import Choose, GenerationState, Sampler, generate, greedy, join, new_state, read, read_sharded, restore
from ...models.hybrid import HybridModel
from ...models.parallelize import leave_sequence
from ...parallel.layout import Layout
from ...parallel.mesh import Mesh, build_mesh
from ..checkpoints.contents import read_contents
from ..checkpoints.model import read_model
from ..environment import Environment
from .printer import Printer
from .prompts import Prompt, find_end, find_tokenizer, read_prompts
from .request import Request
from .state_file import digest_model, load_states, save_states
from .weights import generation_config, load_model

ENDED = "generation/ended"
"""Key in the store that says so."""
POLL = 0.2
"""Seconds between two looks of a rank that has nothing more to do."""


def run_generation(request: Request, environment: Environment) -> None:
    """Prints the continuations, and on stderr what they took. All ranks call it. Raises UserError."""
    if environment.world != request.tp * request.cp:
        raise UserError(f"--tp {request.tp} x --cp {request.cp} on {environment.world} ranks; allowed: as many as their product")
    contents = read_contents(request.checkpoint)
    tokenizer = find_tokenizer(contents.folder)
    prompts = read_prompts(request, tokenizer, read_model(contents.folder).vocab_size)
    config = generation_config(contents, request.tp, request.cp, max((len(prompt.ids) for prompt in prompts), default=1))
    mesh = build_mesh(config.parallel, environment.device.type)
    model = load_model(contents, config, mesh, environment.device)
    with _enough_memory(request.max_new):
        states, prompts, seconds = _read_all(model, prompts, request, mesh, environment.device)
        if mesh.rank("cp") > 0:
            _wait_for_the_end()
            return
        room = max(int(state.lengths) for state in states) + request.max_new
        state = states[0] if len(states) == 1 else join(states, room)
        printer = Printer(tokenizer, prompts) if environment.leads else None
        if printer:
            printer.begin(sum(len(prompt.ids) for prompt in prompts), seconds)
        started = time.perf_counter()
        written = _write_continuations(model, state, request, mesh, find_end(config, tokenizer), printer)
    if printer:
        printer.end(written, time.perf_counter() - started, state)
        _tell_the_others()


@contextmanager
def _enough_memory(max_new: int) -> Iterator[None]:
    """Raises UserError where a device, or the host, has no more."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise UserError(f"not enough memory for the prompts and --max-new {max_new}: {str(error).splitlines()[0]}") from None


def _read_all(
    model: HybridModel, prompts: list[Prompt], request: Request, mesh: Mesh, device: torch.device
) -> tuple[list[GenerationState], list[Prompt], float]:
    """What is known after each prompt, on the first ranks of cp; the prompts; and the seconds. Keeps the states where asked to."""
    digest = digest_model(model)
    prompts, states = _initial_states(request, prompts, model, digest, device)
    started = time.perf_counter()
    _read_prompts(model, prompts, states, request.chunk, mesh, device)
    seconds = time.perf_counter() - started
    if request.save_state is not None and mesh.rank("cp") == 0:
        save_states(request.save_state, states, digest)
    return states, prompts, seconds


def _initial_states(
    request: Request, prompts: list[Prompt], model: HybridModel, digest: str, device: torch.device
) -> tuple[list[Prompt], list[GenerationState]]:
    """Each sequence's prompt and what is known before it. Raises UserError where they are not as many as a state has sequences."""
    if request.state is None:
        return prompts, [new_state(model, len(prompt.ids) + request.max_new) for prompt in prompts]
    more = max((len(prompt.ids) for prompt in prompts), default=0) + request.max_new
    states = load_states(request.state, digest, model, more)
    prompts = prompts or [Prompt([])] * len(states)
    if len(states) == 1:
        states += [restore(states[0].tensors(), int(states[0].lengths), int(states[0].lengths) + more) for _ in prompts[1:]]
    if len(states) != len(prompts):
        raise UserError(
            f"--state {request.state}: {len(states)} sequences in it, {len(prompts)} prompts; allowed: as many, or no prompt"
        )
    return prompts, states


def _read_prompts(
    model: HybridModel, prompts: list[Prompt], states: list[GenerationState], chunk: int, mesh: Mesh, device: torch.device
) -> None:
    """Reads each prompt, over cp as far as it divides; the rest, and all that follows, is the first rank's of cp."""
    layout = Layout("zigzag", mesh.size("cp"))
    rests = []
    for prompt, state in zip(prompts, states, strict=True):
        ids = torch.tensor([prompt.ids], dtype=torch.int64, device=device)
        done = read_sharded(model, ids, state, layout, mesh) if layout.ranks > 1 else 0
        rests.append(ids[:, done:])
    leave_sequence(model)
    if mesh.rank("cp") == 0:
        for rest, state in zip(rests, states, strict=True):
            if rest.shape[1]:
                read(model, rest, state, chunk)


def _write_continuations(
    model: HybridModel, state: GenerationState, request: Request, mesh: Mesh, end: int | None, printer: Printer | None
) -> int:
    """All sequences, until each has met its end or all tokens that were asked for -> tokens written."""
    pick: Choose = Sampler(request.temperature, request.top_p, request.seed) if request.temperature else greedy

    def choose(logits: Tensor) -> Tensor:
        """The same on all ranks of tp."""
        if not logits.isfinite().all():
            raise UserError(f"{request.checkpoint}: logits that are not finite; are its weights?")
        ids = pick(logits)
        if mesh.size("tp") > 1:
            dist.broadcast(ids, group=mesh.group("tp"), group_src=0)
        return ids

    going, written = [True] * len(state.lengths), 0
    for ids in generate(model, state, request.max_new, choose):
        chosen = ids.tolist()
        going = [still and token != end for still, token in zip(going, chosen, strict=True)]
        written += sum(going)
        if printer:
            printer.add(chosen, going)
        if not any(going):
            break
    return written


def _wait_for_the_end() -> None:
    """Of a rank that has nothing more to do; no collective, which would give up after its timeout."""
    store = dist.distributed_c10d._get_default_store()
    while not store.check([ENDED]):
        time.sleep(POLL)


def _tell_the_others() -> None:
    """Those that wait, that nothing more comes."""
    dist.distributed_c10d._get_default_store().set(ENDED, "")
