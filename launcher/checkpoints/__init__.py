"""What a checkpoint holds, read without a process group: listed, or merged into one file."""
