"""The cost model: its bytes and rounds against the table of strategies and against what is sent; the choice; the file."""

import itertools
import math
import time

import pytest
import torch
import torch.distributed as dist

from baton.configs.errors import UserError
from baton.parallel.affine_scan import STRATEGIES as IMPLEMENTED
from baton.parallel.affine_scan import SequenceScan
from baton.parallel.layout import Layout
from baton.parallel.links import DEFAULTS, STRATEGIES, Link, Links, Place, choose, largest_sent, seconds, traffic
from baton.parallel.recorder import record

S, T = 40_000, 400
"""Bytes of a state of 100 heads with 100 elements each, and of its decays."""
KINDS = ["contiguous", "zigzag"]


@pytest.mark.parametrize("R", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_table(kind, R):
    """Rounds and bytes of each strategy, m segments on each of R ranks."""
    layout, m = Layout(kind, R), 1 if kind == "contiguous" else 2
    n = m * R
    rounds = {strategy: len(traffic(strategy, layout, S, T)) for strategy in STRATEGIES}
    assert rounds == {"ring": n - 1, "allgather": 1, "doubling": 1 + math.ceil(math.log2(n - 1)), "sliced": 2}
    sent = {strategy: largest_sent(strategy, layout, S, T) for strategy in STRATEGIES}
    # On two ranks zigzag's 0 1 1 0 passes the ranks' border but twice.
    assert sent["ring"] == (S if R == 2 else m * S)
    assert sent["allgather"] == (R - 1) * m * (S + T)
    assert sent["doubling"] <= m * rounds["doubling"] * (S + T)
    elements = math.ceil(S / 4 / R)
    assert sent["sliced"] <= 2 * m * (R - 1) * elements * 4 + (R - 1) * m * T
    assert sent["sliced"] >= 2 * m * (S - elements * 4) + (R - 1) * m * (T // R)


def test_small_cases_by_hand():
    """Three ranks with a segment each, and zigzag on two."""
    three = Layout("contiguous", 3)
    assert traffic("ring", three, 28, 8) == [28, 28]
    assert traffic("allgather", three, 28, 8) == [72]
    # Round 1: 0 -> 1 -> 2. Round 2: what 1 knows goes to 2.
    assert traffic("doubling", three, 28, 8) == [36, 36]
    # 8 elements in 2 heads are cut into 2, 3 (of both heads) and 3: rank 0 sends 3 + 3 and 2 + 1 decays, then all send slices back.
    assert traffic("sliced", three, 32, 8) == [6 * 4 + 3 * 4, 2 * 12]
    # 0 1 | 1 0: the state stays on rank 1 in the second round.
    assert traffic("ring", Layout("zigzag", 2), 28, 8) == [28, 0, 28]
    assert traffic("doubling", Layout("zigzag", 2), 28, 8) == [36, 36, 36]


def real(rank, kind, world, heads, E, transport):
    """Bytes and rounds of each strategy as recorded on this rank, both directions."""
    layout = Layout(kind, world)
    log_T, U = torch.zeros(1, layout.segments_per_rank, heads), torch.ones(1, layout.segments_per_rank, heads, E)
    counted = {}
    for strategy in IMPLEMENTED:
        scan = SequenceScan(layout, dist.group.WORLD, strategy, transport)
        for reverse in (False, True):
            with record() as traffic:
                scan.start(log_T, U, None, reverse).wait()
            counted[strategy, reverse] = traffic.sent, traffic.rounds
    return counted


@pytest.mark.parametrize(("world", "kind"), [(2, "contiguous"), (3, "zigzag"), (4, "zigzag"), (8, "contiguous"), (8, "zigzag")])
@pytest.mark.parametrize("transport", [None, torch.bfloat16])
def test_the_model_is_what_is_sent(pool, world, kind, transport):
    heads, E, row_bytes = 3, 7, 4 if transport is None else 2
    ranks = pool.run(world, real, kind, world, heads, E, transport)
    assert set(IMPLEMENTED) == set(STRATEGIES)
    for strategy, reverse in itertools.product(STRATEGIES, (False, True)):
        given = strategy, Layout(kind, world), heads * E * row_bytes, heads * 4, row_bytes
        found = [counted[strategy, reverse] for counted in ranks]
        assert max(sent for sent, _ in found) == largest_sent(*given), strategy
        assert {rounds for _, rounds in found} == {len(traffic(*given))}, strategy


@pytest.mark.parametrize("R", [2, 3, 8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_choose_takes_the_cheapest(kind, R):
    layout = Layout(kind, R)
    chosen = set()
    for latency, bandwidth, state in itertools.product((1e-7, 1e-5, 1e-3), (1e8, 1e11), (2**12, 2**18, 2**24)):
        link = Link(latency, bandwidth)
        costs = {s: sum(latency + sent / bandwidth for sent in traffic(s, layout, state, 256)) for s in STRATEGIES}
        found = choose(layout, state, 256, link)
        assert costs[found] <= min(costs.values()) * (1 + 1e-12)
        assert seconds(found, layout, state, 256, link) == pytest.approx(costs[found])
        chosen.add(found)
    assert len(chosen) > 1 or (R, kind) == (2, "contiguous")


def test_of_equally_fast_the_one_that_sends_least():
    """A link without end of bandwidth: on two ranks three strategies take a round, the ring's sends no decays."""
    assert choose(Layout("contiguous", 2), S, T, Link(1e-5, math.inf)) == "ring"


def test_a_thousand_ranks_take_no_time():
    layout = Layout("zigzag", 1024)
    start = time.perf_counter()
    assert choose(layout, 2**22, 512, DEFAULTS["nccl"]) == "sliced"
    assert time.perf_counter() - start < 0.2


HERE = Place("nccl", "NVIDIA H200", 8, 1)


def test_the_file_keeps_what_was_measured(tmp_path):
    file = tmp_path / "new" / "links.yaml"
    measured = {HERE: Link(1.25e-05, 3.1e11), Place("gloo", "cpu", 2, 1): Link(0.0003, 1e9)}
    Links(measured).write(file)
    assert Links.read(file).measured == measured
    assert [path.name for path in file.parent.iterdir()] == ["links.yaml"]


def test_find_takes_the_nearest():
    near, far, other = Link(1e-5, 1e11), Link(2e-5, 2e10), Link(1e-3, 1e9)
    links = Links({HERE: near, HERE._replace(ranks=64, nodes=8): far, Place("gloo", "cpu", 2, 1): other})
    assert links.find(HERE) == near
    assert links.find(HERE._replace(ranks=4)) == near
    assert links.find(HERE._replace(ranks=32, nodes=4)) == far
    assert links.find(HERE._replace(device="another")) == DEFAULTS["nccl"]
    assert Links({}).find(Place("gloo", "cpu", 4, 1)) == DEFAULTS["gloo"]


GOOD = "{backend: gloo, device: cpu, ranks: 2, nodes: 1, latency: 1.0e-5, bandwidth: 1.0e9}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no links; allowed: a list of entries with backend, device, ranks, nodes, latency, bandwidth"),
        ("gloo: 3", "holds no links"),
        ("- [", "no YAML"),
        (f"- {GOOD}\n- 7", "link 2 is 7, allowed: backend, "),
        (f"- {GOOD.replace('1.0e9', '0')}", "link 1, bandwidth is 0, allowed: greater than 0"),
        (f"- {GOOD.replace('1.0e9', '.inf')}", "link 1, bandwidth is inf, allowed: a finite number"),
        (f"- {GOOD.replace('1.0e-5', 'fast')}", "link 1, latency is 'fast', allowed: a valid number"),
        (f"- {GOOD.replace('ranks: 2', 'ranks: 1')}", "link 1, ranks is 1, allowed: greater than or equal to 2"),
        (f"- {GOOD.replace('ranks: 2, ', '')}", "link 1, ranks is missing"),
        (f"- {GOOD.replace('ranks', 'rank')}", "link 1, ranks is missing"),
        (f"- {GOOD.replace('nodes: 1', 'nodes: 1, hosts: 2')}", "link 1, hosts is 2, allowed: backend, "),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, text, says):
    file = tmp_path / "links.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        Links.read(file)
    message = str(error.value)
    assert message.startswith(str(file))
    assert says in message
    assert "\n" not in message


def test_a_file_out_of_reach_is_one_line(tmp_path):
    with pytest.raises(UserError, match="none.yaml: no such file; .*baton bench exchange"):
        Links.read(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        Links.read(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read: is no text"):
        Links.read(tmp_path / "binary")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: "):
        Links({}).write(tmp_path / "file" / "links.yaml")
    with pytest.raises(UserError, match="cannot be written: is a folder"):
        Links({}).write(tmp_path)
    assert not list(tmp_path.parent.glob("*.partial"))
