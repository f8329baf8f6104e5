from qkvnorm_lens.experiments.related.symmetry.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
