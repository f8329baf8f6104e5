from qkvnorm_lens.experiments.related.masks.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
