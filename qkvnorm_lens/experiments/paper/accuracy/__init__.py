from qkvnorm_lens.experiments.paper.accuracy.measure import EXPERIMENT, KINDS, accuracies

__all__ = ["EXPERIMENT", "KINDS", "accuracies"]
