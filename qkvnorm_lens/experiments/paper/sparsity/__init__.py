from qkvnorm_lens.experiments.paper.sparsity.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
