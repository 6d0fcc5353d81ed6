"""SemAlign, its rivals and its controls: a file or a row a method, one ``transfer(pair, data, config)``.

All methods train on ``data.train`` with the same epochs, batch and seed of one ``TransferConfig``, on LoRA of the same
rank and modules, and report the same costs. What a method fixes of the configuration stands in its row or its file.
"""

from __future__ import annotations

import importlib
import pkgutil

from semalign.methods.registry import Method

__all__ = ["REGISTRY", "Method"]

_MODULES = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
REGISTRY: dict[str, Method] = {
    name: row for module in _MODULES for name, row in getattr(module, "METHODS", {}).items()
}  # fmt: skip
"""Every ``METHODS`` row of every file of this folder, by name."""
