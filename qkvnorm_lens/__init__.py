"""Transformers with No-Norm, Pre-Norm and QKV-Norm attention, and what norm noise does to models.

Importing this package imports neither torch nor TransformerLens: each name of ``__init__.pyi`` is
fetched from its module at first use.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*_names, "__version__"]


def __dir__() -> list[str]:
    return __all__
