"""The shipped models' weights and cards, and how they were made."""

from qkvnorm_lens.training.checkpoints.make import install

__all__ = ["install"]
