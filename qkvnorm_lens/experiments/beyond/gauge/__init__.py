from qkvnorm_lens.experiments.beyond.gauge.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
