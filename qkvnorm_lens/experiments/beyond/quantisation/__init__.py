from qkvnorm_lens.experiments.beyond.quantisation.measure import EXPERIMENT, heads, models

__all__ = ["EXPERIMENT", "heads", "models"]
