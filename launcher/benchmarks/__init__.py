"""What `baton bench` measures and prints."""
