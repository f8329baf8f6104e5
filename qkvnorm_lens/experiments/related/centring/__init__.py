from qkvnorm_lens.experiments.related.centring.measure import EXPERIMENT

__all__ = ["EXPERIMENT"]
