from qkvnorm_lens.experiments.paper.accuracy.measure import EXPERIMENT, KINDS, measure

__all__ = ["EXPERIMENT", "KINDS", "measure"]
