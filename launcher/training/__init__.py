"""The training loop and its parts: data, optimizer, checkpoint, metrics."""
