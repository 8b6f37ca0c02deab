"""What mixes over the sequence: one file a mixer. Each is single-device code with a sharding table beside its parameters."""
