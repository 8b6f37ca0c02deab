"""Causal attention through PyTorch's scaled_dot_product_attention."""

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(e)) v, where the last query sees every key, the one before it all but the last, and so on.

    q [b, lq, h, e]; k, v [b, lk, hk, e] with lk >= lq; query head i reads key head i // (h // hk). Returns [b, lq, h, e].
    Raises ValueError, naming the argument.
    """
    if k.shape != v.shape or k.shape[1] < q.shape[1]:
        raise ValueError(f"causal_attention: k {list(k.shape)}, v {list(v.shape)}: expected one shape, at least q's length")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"causal_attention: k has {k.shape[2]} heads, allowed: a divisor of q's {q.shape[2]}")
    repeat = q.shape[2] // k.shape[2]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.shape[2] == k.shape[2]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]))
    return out.transpose(1, 2)
