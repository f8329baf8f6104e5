from qkvnorm_lens.experiments.paper.noise.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
