"""Packed documents are what they are alone: logits and every gradient, on one device and over cp."""

import itertools

import pytest
import torch

from baton.kernels.cross_entropy import IGNORED
from baton.models.hybrid import build_model
from baton.models.stages import build_stages
from baton.parallel.layout import Layout
from baton.parallel.mesh import build_mesh
from helpers import relative_error, tiny_config

MODEL = ["model.pattern=M-mEM-*E", "precision=fp64", "data.documents=packed", "model.moe.aux_loss=0.0"]
"""No balancing loss: it is a product of sums over all tokens of a micro-step, so documents alone do not add up to it."""

BORDERS = [
    # Of 48 tokens: documents of one token, borders on those of segments and ranks of cp 2, 4 and 8, and one over most ranks.
    [0, 1, 2, 6, 9, 12, 13, 24, 25, 48],
    # One document over all ranks.
    [0, 48],
]
TINY_ONES = [[*range(0, 96, 1), *range(96, 192, 2), *range(192, 385, 3)], [0, 191, 192, 193, 384]]
"""Of 384 tokens: two hundred documents of one, two and three, and few."""


def sequences(cu_seqlens):
    """ids and labels [b, L]; a document's last token predicts nothing."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(0, 64, (len(cu_seqlens), cu_seqlens[0][-1] + 1), generator=generator)
    labels = drawn[:, 1:].clone()
    for row, boundaries in zip(labels, cu_seqlens, strict=True):
        row[torch.tensor(boundaries[1:]) - 1] = IGNORED
    return drawn[:, :-1], labels


def alone(config, cu_seqlens):
    """Each document by itself -> logits [b, L, vocab] and gradients of the sum of all losses."""
    model = build_model(config.model, config.seed, torch.float64)
    ids, labels = sequences(cu_seqlens)
    logits = torch.empty(*ids.shape, config.model.vocab_size, dtype=torch.float64)
    for row, boundaries in enumerate(cu_seqlens):
        for start, stop in itertools.pairwise(boundaries):
            document = ids[row : row + 1, start:stop]
            with torch.no_grad():
                logits[row, start:stop] = model(document)[0]
            if stop - start > 1:
                model(document, labels[row : row + 1, start:stop]).cross_entropy.backward()
    return logits, {name: p.grad for name, p in model.named_parameters()}


def packed(rank, config, cu_seqlens):
    """All at once on the config's mesh -> this rank's logits and every whole gradient."""
    mesh = build_mesh(config.parallel, "cpu")
    layout = Layout(config.parallel.layout, mesh.size("cp"))
    (model,) = build_stages(config, mesh, torch.device("cpu")).models
    documents = layout.documents(cu_seqlens, rank)
    positions = layout.positions(rank, cu_seqlens[0][-1])
    ids, labels = (layout.shard(t, rank) for t in sequences(cu_seqlens))
    with torch.no_grad():
        logits = model(ids, positions=positions, documents=documents)
    model(ids, labels, positions, documents).cross_entropy.backward()
    return logits, {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def compare(pool, overrides, cp, layout, cu_seqlens):
    context = f"data.context={cu_seqlens[0][-1]}"
    logits, gradients = alone(tiny_config([*MODEL, *overrides, context]), cu_seqlens)
    places = [f"parallel.cp={cp}", f"parallel.layout={layout}"]
    config = tiny_config([*MODEL, *overrides, context, *places], cp)
    for rank, (found, found_gradients) in enumerate(pool.run(cp, packed, config, cu_seqlens)):
        assert relative_error(found, Layout(layout, cp).shard(logits, rank)) <= 1e-10
        for name, gradient in gradients.items():
            assert relative_error(found_gradients[name], gradient) <= 1e-10, name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("cp", [1, 2, 4, 8])
def test_documents_are_alone(pool, cp, layout):
    compare(pool, ["model.mamba2.chunk_size=5"], cp, layout, BORDERS)


def test_hundreds_of_tiny_documents(pool):
    compare(pool, ["model.mamba2.chunk_size=16", "parallel.strategy=sliced"], 4, "zigzag", TINY_ONES)


def test_packed_data_without_documents_is_refused(pool):
    with pytest.raises(RuntimeError, match="the data is packed .data.documents. and no documents came with it"):
        pool.run(1, without_documents, tiny_config(MODEL))


def without_documents(rank, config):
    (model,) = build_stages(config, build_mesh(config.parallel, "cpu"), torch.device("cpu")).models
    model(torch.zeros(1, 48, dtype=torch.int64))


def test_boundaries_that_are_none_are_refused():
    layout = Layout("contiguous", 2)
    for wrong in ([0, 4, 4, 8], [1, 8], [0, 5, 3, 8], [0]):
        with pytest.raises(ValueError, match="0 first, each one larger|do not cut"):
            layout.documents([wrong], 0)
    with pytest.raises(ValueError, match=r"cu_seqlens end at \[6, 8\], allowed: one length"):
        layout.documents([[0, 8], [0, 6]], 0)
