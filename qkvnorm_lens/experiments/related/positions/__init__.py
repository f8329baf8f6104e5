from qkvnorm_lens.experiments.related.positions.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
