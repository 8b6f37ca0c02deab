"""Fixtures of the tests that need a machine of their own."""

import pytest
from network import Refused, connected_hosts


@pytest.fixture
def two_hosts():
    """`network.Hosts`; skips with the reason where the machine does not allow them."""
    try:
        with connected_hosts() as hosts:
            yield hosts
    except Refused as reason:
        pytest.skip(str(reason))
