"""One folder an operation: reference.py in PyTorch, op.py with the public function."""
