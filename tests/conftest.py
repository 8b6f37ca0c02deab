"""Fixtures that tests share."""

import pytest

from pool import WorkerPool


@pytest.fixture(scope="session")
def pool():
    """Worker processes for the whole session."""
    workers = WorkerPool()
    yield workers
    workers.stop()
