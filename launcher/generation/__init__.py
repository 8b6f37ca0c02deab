"""A checkpoint continues prompts: read in chunks or over ranks, then a token at a time; its state can be kept in a file."""
