"""Pico: a family of small Llamas, trained here on four subjects, that makes the whole book run on a laptop."""

from semalign.classroom.corpora import SUBJECTS, has, items, task_data
from semalign.classroom.family import NAMES, load_pico, load_tokenizer, read_config

__all__ = ["NAMES", "SUBJECTS", "has", "items", "load_pico", "load_tokenizer", "read_config", "task_data"]
