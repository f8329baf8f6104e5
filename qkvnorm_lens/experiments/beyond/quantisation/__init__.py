from qkvnorm_lens.experiments.beyond.quantisation.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
