"""FLOPs: as PyTorch counts them where the PyTorch implementation runs, and what they make of a pipeline's cuts."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from baton.configs.loading import load_config
from baton.kernels.attention import cut
from baton.kernels.attention import reference as attention_reference
from baton.kernels.ssd.reference import chunk_maps, chunk_outputs, make_chunks
from baton.models.flops import causal_pairs, head_flops, layer_flops, model_flops, part_flops, stage_layers
from baton.models.hybrid import BUILDERS
from baton.models.mixers import mamba
from baton.models.vocabulary import Projection

TOKENS = 24
SIZES = [
    "model.d_model=24",
    "model.vocab_size=56",
    "model.mamba2={expand: 2, head_dim: 8, state_dim: 5, groups: 3, conv_width: 4, chunk_size: 16}",
    "model.mamba={expand: 3, state_dim: 6, dt_rank: 5, conv_width: 3}",
    "model.attention={heads: 6, kv_heads: 2, head_dim: 4}",
    "model.mlp.hidden=20",
    "model.moe={experts: 5, top_k: 3, hidden: 10, shared_hidden: 14}",
]
"""Numbers whose products tell which of them were multiplied; chunks that do not divide the tokens."""


@pytest.fixture
def model():
    return load_config("quickstart", SIZES).model


@torch.no_grad()
def counted(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def counted_module(module, d):
    """Its products of matrices on TOKENS tokens; operations of our own, such as the scan, count nothing."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return counted(module, torch.randn(1, TOKENS, d))


class NotStarted(NamedTuple):
    """In place of a selective scan's second half."""

    x: torch.Tensor

    def finish(self):
        return self.x, None


def counted_scan(model):
    sizes = model.mamba2
    heads = model.inner // sizes.head_dim
    B, C = torch.randn(2, 1, TOKENS, sizes.groups, sizes.state_dim)
    x, dt = torch.randn(1, TOKENS, heads, sizes.head_dim), torch.rand(1, TOKENS, heads)
    chunks = make_chunks(x, dt, -torch.ones(heads), B, C, None, 1, sizes.chunk_size)
    states = torch.randn(len(chunks.x), heads, sizes.head_dim, sizes.state_dim)
    return counted(chunk_maps, chunks) + counted(chunk_outputs, chunks, states, None)


def counted_convolution(channels, width):
    padded = torch.randn(1, channels, TOKENS + width - 1)
    return counted(lambda: F.conv1d(padded, torch.randn(channels, 1, width), groups=channels))


def counted_selective_scan(model):
    """What each token does as products of matrices: of the input and B, of decay and state, of state and C."""
    inner, n = model.mamba_inner, model.mamba.state_dim
    x, B = torch.randn(TOKENS, inner, 1), torch.randn(TOKENS, 1, n)
    decay, state = torch.randn(2, TOKENS * inner * n, 1, 1)
    return counted(lambda: (x @ B, decay @ state, torch.randn(TOKENS, inner, n) @ B.mT))


def counted_attention(model, monkeypatch):
    """In tiles of one query and one key, no work is masked away."""
    monkeypatch.setattr(attention_reference, "TILE", 1)
    sizes = model.attention
    q, k, v = (torch.randn(TOKENS, heads, sizes.head_dim) for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads))
    whole = [(0, TOKENS)]
    return counted(lambda: list(attention_reference.forward(q, k, v, cut(whole, whole, whole))))


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_part_counts_as_pytorch_counts_it(kind, model, monkeypatch):
    # Whose reference multiplies some of its matrices, of whole chunks.
    monkeypatch.setattr(mamba, "start_selective_scan", lambda x, *args, **options: NotStarted(x))
    found = counted_module(BUILDERS[kind](model), model.d_model)
    if kind == "mamba2":
        channels = model.inner + 2 * model.mamba2.groups * model.mamba2.state_dim
        found += counted_scan(model) + counted_convolution(channels, model.mamba2.conv_width)
    if kind == "mamba":
        found += counted_selective_scan(model) + counted_convolution(model.mamba_inner, model.mamba.conv_width)
    if kind == "attention":
        found += counted_attention(model, monkeypatch)
    assert part_flops(kind, model, TOKENS) == found


def test_the_head_counts_as_pytorch_counts_it(model):
    assert head_flops(model, TOKENS) == counted_module(Projection(model.d_model, model.vocab_size), model.d_model)


def test_a_layer_is_its_mixer_and_its_feed_forward(model):
    layers = [*model.layers, model.layers[0]._replace(feed_forward=None)]
    assert {layer.feed_forward for layer in layers} == {"mlp", "moe", None}
    for kinds in layers:
        parts = [kind for kind in kinds if kind is not None]
        assert layer_flops(model, kinds, TOKENS) == sum(part_flops(part, model, TOKENS) for part in parts)


def test_the_whole_model_is_its_layers_and_its_head(model):
    found = model_flops(model, TOKENS)
    assert sum(found.values()) == sum(layer_flops(model, kinds, TOKENS) for kinds in model.layers) + head_flops(model, TOKENS)
    assert found["mamba2"] == 3 * part_flops("mamba2", model, TOKENS)


def test_packed_documents_attend_less(model):
    """As two sequences of their own lengths would, in attention; the rest does not change."""
    lengths = 10, 14
    packed = model_flops(model, sum(lengths), sum(map(causal_pairs, lengths)))
    assert packed["attention"] == sum(model_flops(model, length)["attention"] for length in lengths)
    assert packed["moe"] == model_flops(model, sum(lengths))["moe"]


LARGE = [
    "model.pattern=M-M-M-*-",
    "model.repeat=4",
    "model.vocab_size=1024",
    "model.d_model=2048",
    "model.mamba2={head_dim: 64, state_dim: 128, groups: 1, chunk_size: 64}",
    "model.attention={heads: 16, kv_heads: 8, head_dim: 128}",
    "model.mlp.hidden=4096",
]
"""Sixteen layers, every fourth of them attention, in sizes that are trained; the vocabulary weighs little."""
SHORT, LONG = 4096, 262144


def large(*overrides):
    return load_config("quickstart", [*LARGE, *overrides]).model


def lengths(ranges):
    return [len(layers) for layers in ranges]


def test_attention_costs_a_mamba_layer_at_4k_and_many_at_256k():
    model = large()
    ratio = {context: part_flops("attention", model, context) / part_flops("mamba2", model, context) for context in (SHORT, LONG)}
    assert 0.5 < ratio[SHORT] < 2
    assert ratio[LONG] > 10
    assert part_flops("mamba2", model, LONG) == LONG // SHORT * part_flops("mamba2", model, SHORT)


def test_cuts_move_with_the_context():
    """Stages of two layers each; where attention costs many Mamba-2 layers, it has a stage to itself."""
    assert lengths(stage_layers(large(), 8, SHORT)) == [2] * 8
    assert lengths(stage_layers(large(), 8, LONG)) == [3, 1] * 4


def test_a_huge_vocabulary_shortens_the_last_stage():
    assert lengths(stage_layers(large(), 4, SHORT)) == [4, 4, 4, 4]
    assert lengths(stage_layers(large("model.vocab_size=262144"), 4, SHORT)) == [5, 5, 5, 1]


def test_the_patterns_own_cuts_come_first():
    model = large('model.pattern="M-|M-M-*-"', "model.repeat=2")
    assert stage_layers(model, 3, SHORT) == [range(0, 1), range(1, 5), range(5, 8)]
    assert stage_layers(model, 1, SHORT) == [range(0, 8)]


def test_one_stage_has_all_layers():
    assert stage_layers(large(), 1, SHORT) == [range(0, 16)]
