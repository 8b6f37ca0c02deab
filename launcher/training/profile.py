"""What one training step does, and when: a trace of every thread with the exchanges in it, and what they put on the wire."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from ...configs.errors import UserError
from ...parallel.recorder import Traffic, chrome_trace, record

WARM_UP = 2
"""Steps of a run before the one that is profiled: the first allocates, connects and compiles."""


def check_profile_folder(folder: Path) -> Path:
    """Makes the folder. Raises UserError when traces cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--profile {folder}: is no folder that can be written: {error.strerror}") from None
    return folder


@contextmanager
def profiled(folder: Path, rank: int) -> Iterator[None]:
    """Leaves trace-rankR.json (chrome://tracing, Perfetto) and traffic-rankR.json of what runs inside in the folder."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    # Exchanges run in a thread of their own (`parallel.background`).
    threads = _ExperimentalConfig(profile_all_threads=True)
    with record() as traffic, profile(activities=activities, experimental_config=threads) as profiler:
        yield
    path = folder / f"trace-rank{rank}.json"
    profiler.export_chrome_trace(str(path))
    trace = json.loads(path.read_text())
    start = trace["baseTimeNanoseconds"] / 1e3
    spans = [event | {"ts": event["ts"] - start} if "ts" in event else event for event in chrome_trace(traffic)["traceEvents"]]
    path.write_text(json.dumps(trace | {"traceEvents": trace["traceEvents"] + spans}))
    (folder / f"traffic-rank{rank}.json").write_text(json.dumps(_summary(traffic), indent=1))


def _summary(traffic: Traffic) -> dict[str, object]:
    rows = [
        {"operation": operation, "group": group, "bytes": total.sent, "rounds": total.rounds}
        for (operation, group), total in sorted(traffic.summary().items(), key=lambda item: -item[1].sent)
    ]
    return {"rank": traffic.rank, "bytes": traffic.sent, "rounds": traffic.rounds, "by operation and group": rows}
