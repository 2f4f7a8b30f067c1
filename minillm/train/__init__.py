"""Fine-tuning, and training from nothing, through the same decoder. No padding: documents share rows (`packing.py`)."""

from minillm.train.finetuning import Finetuned, finetune

__all__ = ["Finetuned", "finetune"]
