"""Cross entropy of a language model: of logits, or of hidden states and the projection to logits together."""

from .op import IGNORED, projected_cross_entropy_sum
from .reference import cross_entropy_sum
