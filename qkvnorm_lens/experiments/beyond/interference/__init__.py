from qkvnorm_lens.experiments.beyond.interference.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
