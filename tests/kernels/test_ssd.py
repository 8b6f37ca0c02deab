"""The chunked SSD scan against the token-by-token recurrence in fp64: values and every gradient."""

import pytest
import torch
from ssd_operands import assert_close, documents, fast, operands, oracle, outcome

from helpers import relative_error


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((2, 37, 4, 8, 2, 4), 8),
        ((1, 64, 6, 4, 3, 16), 16),
        ((2, 5, 2, 8, 1, 8), 64),
        ((1, 1, 2, 4, 2, 4), 4),
        ((1, 9, 2, 4, 1, 4), 1),
    ],
)
def test_fp64_is_exact(shape, chunk):
    values = operands(*shape)
    assert_close(outcome(fast, values, chunk), outcome(oracle, values), 1e-12)


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_documents_do_not_leak(share):
    values, resets = operands(2, 53, 4, 8, 2, 4), documents(2, 53, share)
    found = outcome(fast, values, 16, resets=resets)
    assert_close(found, outcome(oracle, values, resets=resets), 1e-12)


def test_a_document_is_what_it_is_alone():
    values = operands(1, 40, 4, 8, 2, 4)
    resets = (torch.arange(40) == 13)[None]
    packed = fast(values, 8, resets=resets)[0]
    alone = {name: t[:, 13:] if name in {"x", "dt", "B", "C"} else t for name, t in values.items()}
    alone["initial_state"] = torch.zeros_like(values["initial_state"])
    assert relative_error(packed[:, 13:], fast(alone, 8)[0]) <= 1e-12


def test_a_reset_at_the_first_token_forgets_the_initial_state():
    values = operands(1, 10, 4, 8, 2, 4)
    fresh = fast(values, 4, resets=(torch.arange(10) == 0)[None])[0]
    alone = values | {"initial_state": torch.zeros_like(values["initial_state"])}
    assert relative_error(fresh, fast(alone, 4)[0]) <= 1e-12


def test_limits_of_dt():
    values, limit = operands(2, 37, 4, 8, 2, 4), (0.05, 0.8)
    assert_close(outcome(fast, values, 8, dt_limit=limit), outcome(oracle, values, dt_limit=limit), 1e-12)


def test_state_carries_a_sequence_on():
    values = operands(1, 50, 4, 8, 2, 4)
    whole, final = fast(values, 16)
    first = {name: t[:, :21] if name in {"x", "dt", "B", "C"} else t for name, t in values.items()}
    second = {name: t[:, 21:] if name in {"x", "dt", "B", "C"} else t for name, t in values.items()}
    y, state = fast(first, 16)
    rest, end = fast(second | {"initial_state": state}, 16)
    assert relative_error(torch.cat([y, rest], 1), whole) <= 1e-12
    assert relative_error(end, final) <= 1e-12


def plain(t, resets=None):
    """The recurrence in the operands' own type: what plain PyTorch gives."""
    return oracle(t, resets=resets)


@pytest.mark.parametrize("dt_scale", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_plain(dtype, dt_scale):
    """Error against fp64 at most twice that of the recurrence in the same type, or 1e-5 in fp32."""
    values = {name: t.to(dtype) for name, t in operands(1, 150, 4, 8, 2, 16, dt_scale).items()}
    resets = documents(1, 150, 0.02)
    exact = outcome(oracle, {name: t.double() for name, t in values.items()}, resets=resets)
    found, same_type = outcome(fast, values, 32, resets=resets), outcome(plain, values, resets=resets)
    for name, value in exact.items():
        error, allowed = relative_error(found[name], value), 2 * relative_error(same_type[name], value)
        assert error <= max(allowed, 1e-5), f"{name}: {error}, plain {allowed / 2}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 4)}, "x is"),
        ({"dt": torch.zeros(2, 8, 3)}, "dt is"),
        ({"B": torch.zeros(2, 8, 3, 4), "C": torch.zeros(2, 8, 3, 4)}, "B has 3 groups"),
        ({"C": torch.zeros(2, 8, 2, 5)}, "C is"),
        ({"D": torch.zeros(3)}, "D is"),
        ({"initial_state": torch.zeros(1, 4, 8, 4)}, "initial_state is"),
    ],
)
def test_bad_operands_are_named(change, message):
    values = {name: t.float() for name, t in operands(2, 8, 4, 8, 2, 4).items()} | change
    with pytest.raises(ValueError, match=f"ssd: {message}"):
        fast(values, 4)


def test_bad_options_are_named():
    values = {name: t.float() for name, t in operands(2, 8, 4, 8, 2, 4).items()}
    with pytest.raises(ValueError, match="ssd: chunk_size is 0"):
        fast(values, 0)
    with pytest.raises(ValueError, match="ssd: dt_limit"):
        fast(values, 4, dt_limit=(1.0, 0.5))
    with pytest.raises(ValueError, match="ssd: resets is"):
        fast(values, 4, resets=torch.zeros(2, 7))
