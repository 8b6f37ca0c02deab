"""Cross entropy of a language model's logits."""

from .op import IGNORED, cross_entropy_sum
