from qkvnorm_lens.experiments.related.spectrum.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
