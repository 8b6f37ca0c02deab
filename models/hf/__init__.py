"""Hugging Face's hybrids in and out: Jamba, Mamba2, Bamba, GraniteMoeHybrid and NemotronH."""

from .checkpoint import HFCheckpoint, write_checkpoint
from .model import HFModel, load_hf, save_hf
