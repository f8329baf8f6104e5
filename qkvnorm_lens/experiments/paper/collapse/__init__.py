from qkvnorm_lens.experiments.paper.collapse.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
