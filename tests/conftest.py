"""Fixtures that tests share."""

import pytest

from pool import WorkerPool


@pytest.fixture(scope="session")
def pool():
    """Four worker processes for the whole session."""
    workers = WorkerPool(4)
    yield workers
    workers.stop()
