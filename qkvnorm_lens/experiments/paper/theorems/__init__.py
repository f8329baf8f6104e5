from qkvnorm_lens.experiments.paper.theorems.measure import EXPERIMENT, figure

__all__ = ["EXPERIMENT", "figure"]
