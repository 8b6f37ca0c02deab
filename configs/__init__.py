"""What a run is made of: the YAML presets and the schema that checks them. Imports no torch."""
