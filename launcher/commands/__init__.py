"""One file for each `baton` command; their bodies import torch only when they run."""
