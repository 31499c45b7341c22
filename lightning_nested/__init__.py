"""Nested optimization inside the Lightning Trainer you already have.

Every public name can be imported from here or from its package. ``__init__.pyi`` lists the names, for type checkers and
for this file alike. Nothing is loaded before it is asked for (SPEC 1): the core must not pay for importing Lightning,
nor ``lightning-nested --help`` for importing torch.

>>> from lightning_nested import Neumann
>>> Neumann.__module__.startswith("lightning_nested.linalg")
True
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", *__all__]
