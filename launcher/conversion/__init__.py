"""Hugging Face's checkpoints into this package's and back, one tensor in memory at a time, and whether both compute the same."""
