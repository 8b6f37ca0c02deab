"""Whether a model on a mesh is the model on one rank: what `baton verify` compares."""
