"""Which mesh a run is to take: what every mesh would hold, send and last, before any GPU is asked for."""
