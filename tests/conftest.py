"""Fixtures that tests share."""

import interpreter  # isort: skip  # first: before whatever imports triton

import warnings

import pytest
import torch

from pool import WorkerPool


def pytest_report_header():
    """Where this session's Triton kernels run."""
    return f"kernels: {'interpreter on the CPU' if interpreter.INTERPRETED else torch.cuda.get_device_name()}"


@pytest.fixture(scope="session")
def pool():
    """Worker processes for the whole session."""
    workers = WorkerPool()
    yield workers
    workers.stop()


@pytest.fixture
def poisoned():
    """What torch.empty and its kin return is filled with nan, or the largest integer, also within registered operators."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # PyTorch fills memory that is not initialized where algorithms are to be deterministic.
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
