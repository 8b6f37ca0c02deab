"""`baton bench exchange`: what it prints without processes, what it measures with two, one line for what is wrong."""

import itertools
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from baton.launcher.benchmarks.exchange import fit
from baton.launcher.benchmarks.report import ranges, size
from baton.launcher.cli import app
from baton.parallel.layout import Layout
from baton.parallel.links import STRATEGIES, Link, Links, Place, choose, largest_sent, seconds, traffic


def run(*options):
    return CliRunner().invoke(app, ["bench", "exchange", *options])


def table(text):
    """The printed cells' lines by state and strategy: {"64 KiB": {"ring": ["1.03 ms", "64 KiB in 63", ""], ...}}."""
    header, _, *lines = text[text.index(" state ") :].splitlines()
    starts = [0, *(header.index(name) for name in STRATEGIES), len(header)]
    rows = []
    for line in lines[: lines.index(next(line for line in lines if not line.strip()))]:
        state, *cells = [line[start:stop].strip() for start, stop in itertools.pairwise(starts)]
        if state:
            rows.append((state, {name: [] for name in STRATEGIES}))
        for name, cell in zip(STRATEGIES, cells, strict=True):
            rows[-1][1][name].append(cell)
    return dict(rows)


@pytest.mark.parametrize(("ranks", "kind"), [(2, "contiguous"), (64, "zigzag"), (1000, "contiguous")])
def test_simulated_table(ranks, kind):
    """Every number is the model's, and the winner is marked."""
    options = ["--ranks", str(ranks), "--layout", kind, "--latency", "20", "--bandwidth", "12.5", "--heads", "24"]
    result = run("--simulate", *options, "--head-dim", "32", "--state-dim", "64", "--max-ranks", "128")
    assert result.exit_code == 0, result.output
    rows, layout, link = table(result.stdout), Layout(kind, ranks), Link(20e-6, 12.5e9)
    assert list(rows) == ["64 KiB", "192 KiB", "256 KiB", "1 MiB", "4 MiB", "16 MiB"]
    for text, cells in rows.items():
        number, unit = text.split()
        state = int(number) * {"KiB": 2**10, "MiB": 2**20}[unit]
        decays = state // (32 * 64 * 4) * 4
        for strategy, (time, sent, mark) in cells.items():
            expected = seconds(strategy, layout, state, decays, link)
            assert float(time.removesuffix(" ms")) == pytest.approx(expected * 1e3, rel=6e-3)
            rounds = len(traffic(strategy, layout, state, decays))
            assert sent == f"{size(largest_sent(strategy, layout, state, decays))} in {rounds}"
            assert mark == ("fastest" if strategy == choose(layout, state, decays, link) else "")


def test_which_wins_where():
    """A slow start and a wide road: gathers first; then whatever sends least. The words agree with the model."""
    result = run("--simulate", "--ranks", "8", "--latency", "100", "--bandwidth", "10", "--max-ranks", "16")
    words = " ".join(result.stdout.split())
    link, layout = Link(1e-4, 1e10), Layout("contiguous", 8)
    by_size = [(size(2**k), choose(layout, 2**k, max(2**k // 2**15, 1) * 4, link)) for k in range(12, 27)]
    assert len({winner for _, winner in by_size}) > 1
    assert f"By state size, 8 ranks: {ranges(by_size)}." in words
    by_ranks = [(str(R), choose(Layout("contiguous", R), 2**22, 512, link)) for R in (2, 4, 8, 16)]
    assert f"By ranks, 128 heads of 64 x 128 (4 MiB): {ranges(by_ranks)}." in words


def test_words_and_numbers():
    assert ranges([("2", "ring"), ("4", "sliced"), ("8", "sliced")]) == "ring at 2, sliced from 4 to 8"
    assert [size(n) for n in (512, 1536, 1023 * 2**10, 2**40)] == ["512 B", "1.5 KiB", "1023 KiB", "1024 GiB"]


def test_fit():
    """A line's constants come back; where noise makes them negative, the ends of the line say them."""
    link = fit([(n, 2e-5 + n / 3e9) for n in (1024, 2**16, 2**20, 2**24)])
    assert link == pytest.approx(Link(2e-5, 3e9))
    assert fit([(1000, 1e-5), (2000, 3e-5)]) == pytest.approx(Link(1e-5, 1 / 2e-8))
    assert fit([(1000, 2e-5), (2000, 1e-5)]).bandwidth == pytest.approx(2000 / 1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--simulate"], "--ranks is missing, --simulate needs it; allowed: 2 to 1024"),
        (["--simulate", "--ranks", "1"], "--ranks is 1, allowed: 2 to 1024"),
        (["--simulate", "--ranks", "1025"], "--ranks is 1025, allowed: 2 to 1024"),
        (["--simulate", "--ranks", "8", "--max-ranks", "0"], "--max-ranks is 0, allowed: 2 to 1024"),
        (["--simulate", "--ranks", "8", "--bandwidth", "0"], "--bandwidth is 0.0, allowed: more than 0"),
        (["--simulate", "--ranks", "8", "--latency", "-1"], "--latency is -1.0, allowed: more than 0"),
        (["--simulate", "--ranks", "8", "--latency", "nan"], "--latency is nan, allowed: more than 0"),
        (["--simulate", "--ranks", "8", "--heads", "0"], "--heads is 0, allowed: more than 0"),
        (["--simulate", "--ranks", "8", "--quick"], "--quick measures, which --simulate does not"),
        (["--simulate", "--ranks", "8", "--layout", "ring"], "--layout is 'ring', allowed: contiguous, zigzag"),
        (["--ranks", "8"], "--ranks is of --simulate, which is not given"),
        (["--nproc", "1"], "--nproc is 1, allowed: 2 and more"),
        (["--nproc", "2", "--links", "."], ".: cannot be read: Is a directory"),
        (["--nproc", "2", "--links", f"{__file__}/links.yaml"], f"links.yaml: cannot be written: {__file__}: File exists"),
    ],
)
def test_bad_input_is_one_line(options, says):
    result = run(*options)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


def test_two_processes(tmp_path):
    """The table has what was sent, marks a winner and what `auto` takes, and the file has the new link beside the old."""
    file, old = tmp_path / "links.yaml", {Place("nccl", "NVIDIA H200", 8, 1): Link(1e-5, 1e11)}
    Links(old).write(file)
    command = [sys.executable, "-P", "-m", "baton.launcher.cli", "bench", "exchange", "--nproc", "2", "--quick"]
    done = subprocess.run(
        [*command, "--layout", "zigzag", "--links", str(file)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = Links.read(file).measured
    (link,) = (link for place, link in measured.items() if place == Place("gloo", "cpu", 2, 1))
    assert measured.items() > old.items()
    assert 1e-6 < link.latency < 0.1
    assert 1e6 < link.bandwidth < 1e12
    rows, layout = table(done.stdout), Layout("zigzag", 2)
    assert list(rows) == ["64 KiB", "1 MiB"]
    for state, decays, cells in zip((2**16, 2**20), (8, 128), rows.values(), strict=True):
        for strategy, (time, sent, marks) in cells.items():
            measured_ms, predicted_ms = (float(number) for number in time.removesuffix(") ms").split(" ("))
            assert measured_ms > 0
            assert predicted_ms == pytest.approx(seconds(strategy, layout, state, decays, link) * 1e3, rel=6e-3)
            rounds = len(traffic(strategy, layout, state, decays))
            assert sent == f"{size(largest_sent(strategy, layout, state, decays))} in {rounds}"
            assert ("auto" in marks) == (strategy == choose(layout, state, decays, link))
        fastest = [strategy for strategy, (_, _, marks) in cells.items() if "fastest" in marks]
        times = {strategy: float(time.split()[0]) for strategy, (time, _, _) in cells.items()}
        assert [times[strategy] for strategy in fastest] == [min(times.values())]
