"""What distributed tests share: a tiny hybrid, its data, and how far results are from a reference."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from baton.configs.loading import load_config
from baton.configs.schema import Config
from baton.models.hybrid import build_model
from baton.models.moe import Experts
from baton.models.parallelize import DTYPES, build_sharded_model
from baton.parallel.mesh import build_mesh

SEQUENCES, CONTEXT, VOCAB = 2, 48, 64

TINY = [
    f"model.vocab_size={VOCAB}",
    "model.d_model=32",
    "model.mamba2={head_dim: 8, state_dim: 8, groups: 2, chunk_size: 7}",
    "model.attention={heads: 4, kv_heads: 2, head_dim: 8, rope: {}}",
    "model.mlp.hidden=32",
    "model.moe={experts: 4, top_k: 2, hidden: 16, aux_loss: 0.1}",
    "model.initializer_range=0.2",
    f"data.context={CONTEXT}",
    f"batch.sequences={SEQUENCES}",
]
"""Overrides of the quickstart: every kind of layer, chunks that do not divide a segment, an aux loss that counts."""


class Outcome(NamedTuple):
    """Of one forward and backward; gradients by parameter name, everything whole and on the CPU."""

    loss: torch.Tensor
    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]
    choices: list[list[list[int]]]
    """The experts of each token, by MoE layer; tokens in the order of the sequence."""


def tiny_config(overrides: list[str], world: int = 1, **paths: Path) -> Config:
    """The tiny hybrid, with paths such as run=... as further overrides."""
    named = [f"{key.replace('__', '.')}={value}" for key, value in paths.items()]
    return load_config("quickstart", [*TINY, *overrides, *named], world)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels [SEQUENCES, CONTEXT]; some labels count nothing."""
    drawn = torch.randint(0, VOCAB, (SEQUENCES, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
    labels = drawn[:, 1:].clone()
    labels[0, 5:9] = -100
    return drawn[:, :-1], labels


def run_alone(config: Config) -> Outcome:
    """On one device, without any wiring."""
    model = build_model(config.model, config.seed, DTYPES[config.precision])
    ids, labels = tokens()
    choices = record_choices(model)
    losses = model(ids, labels)
    loss = losses.cross_entropy / (labels >= 0).sum() + losses.auxiliary
    loss.backward()
    with torch.no_grad():
        logits = model(ids)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return Outcome(
        loss.detach(), logits, gradients, [c.view(SEQUENCES, CONTEXT, -1).tolist() for c in choices[: len(choices) // 2]]
    )


def record_choices(model: torch.nn.Module) -> list[torch.Tensor]:
    """Collects the chosen experts [tokens, k], sorted, of each MoE layer at each forward from now on."""
    choices: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Experts):
            module.register_forward_pre_hook(lambda _, args: choices.append(args[2].sort(-1).values))
    return choices


def run_sharded(rank: int, config: Config) -> Outcome:
    """On the config's mesh over the default group, as training does it; every rank returns the whole."""
    from baton.parallel.layout import Layout

    mesh = build_mesh(config.parallel, "cpu")
    model = build_sharded_model(config, mesh, torch.device("cpu"))
    layout = Layout(config.parallel.layout, mesh.size("cp"))
    positions = layout.positions(mesh.rank("cp"), CONTEXT)
    ids, labels = (t.chunk(mesh.size("dp"))[mesh.rank("dp")][:, positions] for t in tokens())
    choices = record_choices(model)
    losses = model(ids, labels, positions)
    share = losses.cross_entropy / (tokens()[1] >= 0).sum()
    (share + losses.auxiliary).backward()
    loss = share.detach().clone()
    torch.distributed.all_reduce(loss, group=mesh.group("dp_cp"))
    with torch.no_grad():
        logits = gather_tokens(model(ids, positions=positions), mesh, layout)
    chosen = [gather_tokens(c.view(*ids.shape, -1), mesh, layout).tolist() for c in choices[: len(choices) // 2]]
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return Outcome(loss + losses.auxiliary.detach(), logits, gradients, chosen)


def gather_tokens(own: torch.Tensor, mesh: Any, layout: Any) -> torch.Tensor:
    """[b, l, ...] of each rank of dp and cp -> [SEQUENCES, CONTEXT, ...]."""
    parts = [torch.empty_like(own) for _ in range(mesh.size("dp_cp"))]
    torch.distributed.all_gather(parts, own.contiguous(), group=mesh.group("dp_cp"))
    cp = mesh.size("cp")
    rows = []
    for dp in range(mesh.size("dp")):
        row = own.new_empty(own.shape[0], CONTEXT, *own.shape[2:])
        for rank in range(cp):
            row[:, layout.positions(rank, CONTEXT)] = parts[dp * cp + rank]
        rows.append(row)
    return torch.cat(rows)


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference over the largest reference value; nan and inf stay, so that comparisons with them fail."""
    assert found.shape == reference.shape, (found.shape, reference.shape)
    largest = reference.abs().max()
    assert largest > 0, "a reference that is all zero shows nothing"
    return ((found.double() - reference.double()).abs().max() / largest).item()


def errors(found: Outcome, reference: Outcome) -> dict[str, float]:
    """Of the loss, the logits and every gradient."""
    assert found.gradients.keys() == reference.gradients.keys()
    gradients = {name: relative_error(found.gradients[name], g) for name, g in reference.gradients.items()}
    return {
        "loss": relative_error(found.loss, reference.loss),
        "logits": relative_error(found.logits, reference.logits),
        **gradients,
    }


SMALL_RUN = [
    "model.vocab_size=288",
    "model.initializer_range=0.1",
    "data.tokenizer.kind=byte",
    "data.context=64",
    "data.validation_fraction=0.1",
    "batch={sequences: 2, micro_steps: 1}",
    "schedule={steps: 6, warmup: 2}",
    "checkpoint={every: 2, keep: 2}",
    "evaluation={every: 3, sequences: 3}",
    "logging.sample_tokens=4",
]
"""Overrides of the tiny hybrid with which training takes a moment."""


def small_run(tmp_path: Path, overrides: list[str], text: Path | None, world: int = 1, name: str = "run") -> Config:
    """A config whose run and data folders lie in tmp_path."""
    paths = [f"run={tmp_path / name}", f"data.folder={tmp_path / 'data'}", f"data.input=[{text}]" if text else "data.input=[]"]
    return load_config("quickstart", [*TINY, *SMALL_RUN, *paths, *overrides], world)
