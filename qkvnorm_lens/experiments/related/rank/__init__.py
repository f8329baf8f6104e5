from qkvnorm_lens.experiments.related.rank.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
