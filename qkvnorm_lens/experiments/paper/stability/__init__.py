from qkvnorm_lens.experiments.paper.stability.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
