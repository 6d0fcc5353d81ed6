"""SemAlign in one small module: what the notebooks of this book call."""

__version__ = "0.1.0"
