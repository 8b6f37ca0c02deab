"""Hugging Face's checkpoints into this package's and back, a tensor at a time, and whether both compute the same."""
