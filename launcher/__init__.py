"""The command line, the training loop and what starts and feeds it. Top layer: may import every other."""
