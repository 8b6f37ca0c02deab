"""What the recorder counts, against numbers worked out by hand: 4 ranks, tensors of 4-byte elements."""

import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from baton.parallel.recorder import Total, chrome_trace, note_round, record

WORLD = 4


def every_function(rank):
    """Each function once -> the bytes that were counted for it, by its name."""
    group = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("cp",)).get_group()
    one, all_of_them = torch.ones(6), torch.ones(WORLD * 6)
    parts = [torch.ones(5) for _ in range(WORLD)]
    # To rank j go j + 1 rows of 3 elements from everyone.
    rows = [j + 1 for j in range(WORLD)]
    calls = {
        "all_reduce": lambda f: f(one, group=group),
        "all_gather": lambda f: f([torch.empty(6) for _ in range(WORLD)], one),
        "all_gather_single": lambda f: f(all_of_them, one, group),
        "all_gather_into_tensor": lambda f: f(all_of_them, input_tensor=one),
        "_all_gather_base": lambda f: f(all_of_them, one),
        "reduce_scatter": lambda f: f(torch.empty(6), [one] * WORLD),
        "reduce_scatter_single": lambda f: f(torch.empty(6), all_of_them),
        "reduce_scatter_tensor": lambda f: f(torch.empty(6), all_of_them),
        "_reduce_scatter_base": lambda f: f(torch.empty(6), all_of_them),
        "all_to_all_single": lambda f: f(torch.empty(24), all_of_them),
        "uneven": lambda f: f(torch.empty(WORLD * (rank + 1), 3), torch.ones(10, 3), [rank + 1] * WORLD, rows),
        "all_to_all": lambda f: f([torch.empty(5) for _ in range(WORLD)], parts),
        "broadcast": lambda f: f(one, src=2),
    }
    counted = {}
    for name, call in calls.items():
        function = "all_to_all_single" if name == "uneven" else name
        if hasattr(dist, function):
            with warnings.catch_warnings(), record() as traffic:
                warnings.simplefilter("ignore")
                call(getattr(dist, function))
            (event,) = traffic.events
            counted[name] = event.operation, event.group, event.size, event.sent
    return counted, hasattr(dist, "all_gather_single")


def test_every_function(pool):
    results = pool.run(WORLD, every_function)
    gather, scatter = ("all_gather", "default_pg", 4, 3 * 24), ("reduce_scatter", "default_pg", 4, 3 * 24)
    for rank, (counted, has_single) in enumerate(results):
        expected = {
            "all_reduce": ("all_reduce", counted["all_reduce"][1], 4, 2 * 24 * 3 // 4),
            **dict.fromkeys(("all_gather", "all_gather_into_tensor", "_all_gather_base"), gather),
            **dict.fromkeys(("reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base"), scatter),
            "all_to_all_single": ("all_to_all", "default_pg", 4, 3 * 24),
            "uneven": ("all_to_all", "default_pg", 4, (10 - (rank + 1)) * 12),
            "all_to_all": ("all_to_all", "default_pg", 4, 3 * 20),
            "broadcast": ("broadcast", "default_pg", 4, 3 * 24 if rank == 2 else 0),
        }
        if has_single:
            expected |= {"all_gather_single": (gather[0], counted["all_gather_single"][1], *gather[2:])}
            expected |= {"reduce_scatter_single": scatter}
        assert counted == expected


def point_to_point(rank):
    tensor, received = torch.ones(5), torch.empty(5)
    right, left = (rank + 1) % WORLD, (rank - 1) % WORLD
    made_before = dist.P2POp(dist.isend, tensor, right)
    with record() as traffic:
        operations = [made_before, dist.P2POp(dist.isend, tensor[:2].clone(), left)]
        operations += [dist.P2POp(dist.irecv, received, left), dist.P2POp(dist.irecv, torch.empty(2), right)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        note_round("batch_isend_irecv", dist.group.WORLD)
        if rank == 0:
            dist.send(tensor, 1)
            dist.isend(tensor, 1).wait()
        if rank == 1:
            dist.recv(received, 0)
            dist.irecv(received).wait()
    note_round("batch_isend_irecv", dist.group.WORLD)
    return traffic.summary(), traffic.sent, traffic.rounds


def test_point_to_point(pool):
    """A batch is one round, so is one in which this rank has no part; single calls are one each."""
    batches = {("batch_isend_irecv", "default_pg"): Total(20 + 8, 2)}
    found = pool.run(WORLD, point_to_point)
    assert found[0] == (batches | {("send", "default_pg"): Total(40, 2)}, 68, 4)
    assert found[1] == (batches | {("recv", "default_pg"): Total(0, 2)}, 28, 4)
    assert found[2] == found[3] == (batches, 28, 2)


def subgroups(rank):
    """One group is counted under its own size; a group of others is no traffic of this rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    others = dist.new_group([0, 1])
    with record() as traffic:
        dist.all_reduce(torch.ones(8), group=mesh.get_group("cp"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist.all_reduce(torch.ones(8), group=others)
    return [(event.group, event.size, event.sent) for event in traffic.events], others.group_name if rank < 2 else None


def test_subgroups(pool):
    for events, others in pool.run(WORLD, subgroups):
        assert events == [("mesh_cp", 2, 32)] + ([(others, 2, 32)] if others else [])


def overlapping(rank):
    """An exchange in another thread that waits for a slow rank, and a record within the record."""
    outer_group, received = dist.new_group(range(2)), torch.empty(4)

    def exchange():
        time.sleep(0.3 * rank)
        operations = [dist.P2POp(dist.isend, torch.ones(4), 1 - rank, outer_group)]
        operations += [dist.P2POp(dist.irecv, received, 1 - rank, outer_group)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    with record() as outer:
        thread = threading.Thread(target=exchange)
        thread.start()
        work = dist.all_reduce(torch.ones(2), async_op=True)
        time.sleep(0.05)
        work.wait()
        thread.join()
        with record() as inner:
            dist.broadcast(torch.ones(2), src=0)
    spans = {event.operation: event.end - event.start for event in outer.events}
    threads = {event.operation: event.thread for event in outer.events}
    return len(inner.events), len(outer.events), spans, len(set(threads.values())), chrome_trace(outer)


def test_threads_and_times(pool):
    """A span lasts until the wait has ended, in the thread that called."""
    results = pool.run(2, overlapping)
    for rank, (inner, outer, spans, threads, trace) in enumerate(results):
        assert (inner, outer, threads) == (1, 3, 2)
        assert spans["all_reduce"] >= 0.05
        name, *drawn = trace["traceEvents"]
        assert name["args"]["name"] == f"rank {rank}"
        assert {(e["ph"], e["pid"], e["name"]) for e in drawn} == {("X", rank, operation) for operation in spans}
        durations = {e["name"]: e["dur"] for e in drawn}
        assert durations["batch_isend_irecv"] == pytest.approx(spans["batch_isend_irecv"] * 1e6)
    assert results[0][2]["batch_isend_irecv"] >= 0.2


def test_all_is_restored():
    names = ["all_reduce", "all_gather", "all_to_all_single", "batch_isend_irecv", "broadcast", "isend", "P2POp"]
    before = [getattr(dist, name) for name in names] + [dist.ProcessGroup.send, dist.Work.wait]

    def fail():
        with record(), record():
            assert dist.all_reduce is not before[0]
            raise KeyError("within")

    with pytest.raises(KeyError, match="within"):
        fail()
    assert [getattr(dist, name) for name in names] + [dist.ProcessGroup.send, dist.Work.wait] == before
