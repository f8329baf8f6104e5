"""Transformers with No-Norm, Pre-Norm and QKV-Norm attention; models by name."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
