from qkvnorm_lens.experiments.paper.spread.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
