"""Baton: Jamba-style hybrid language models trained on very long contexts, the sequence sharded by state passing."""

__version__ = "0.1.0"
