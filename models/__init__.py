"""Single-device models of hybrids; parallelize.py is the one place where they meet a mesh."""
