"""Causal attention, computed in pieces whose softmaxes are merged by their log-sum-exp; no device ever holds an L x L matrix."""

from .op import RunningAttention, attention_gradients, causal_attention, check_operands, continued_attention, document_rows, flat
from .pieces import Piece, Span, area, cut
