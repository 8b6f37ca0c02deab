"""Which megatron-core the spec is written for."""

from importlib.metadata import PackageNotFoundError, version

SERIES = "0.16"
INSTALL = f"pip install 'megatron-core>={SERIES},<0.17'"


def check_version() -> None:
    """Raises ImportError where megatron-core is missing, or of another series: its modules change with every one."""
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        raise ImportError(f"baton.models.megatron needs megatron-core {SERIES}, which is not installed: {INSTALL}") from None
    if found.split(".")[:2] != SERIES.split("."):
        raise ImportError(f"baton.models.megatron is written for megatron-core {SERIES}, found {found}: {INSTALL}")
