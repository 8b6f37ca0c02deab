"""Layouts: every token on one rank, in ascending segments, and the sizes that do not cut are refused."""

import pytest
import torch

from baton.parallel.layout import Layout


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_token_is_on_one_rank(kind, ranks):
    layout = Layout(kind, ranks)
    positions = [layout.positions(rank, 48) for rank in range(ranks)]
    assert torch.equal(torch.cat(positions).sort().values, torch.arange(48))
    assert all(torch.equal(p, p.sort().values) for p in positions)


def test_zigzag_gives_even_causal_work():
    work = [int((Layout("zigzag", 4).positions(rank, 48) + 1).sum()) for rank in range(4)]
    assert work == [sum(range(1, 49)) // 4] * 4


def test_places_are_in_sequence_order():
    layout = Layout("zigzag", 3)
    assert layout.owners == [0, 1, 2, 2, 1, 0]
    assert layout.places == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]


def test_shard():
    whole = torch.arange(24).view(2, 12)
    assert Layout("zigzag", 2).shard(whole, 0).tolist() == [[0, 1, 2, 9, 10, 11], [12, 13, 14, 21, 22, 23]]


def test_lengths_that_do_not_cut_are_refused():
    with pytest.raises(ValueError, match="50 tokens do not cut into 8 equal segments"):
        Layout("zigzag", 4).positions(0, 50)
