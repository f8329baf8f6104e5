from qkvnorm_lens.experiments.beyond.confound.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
