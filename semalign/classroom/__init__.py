"""Pico: a family of small Llamas, trained here on four subjects, that makes the whole book run on a laptop."""

from semalign.classroom.corpora import SUBJECTS, items, task_data, write_data
from semalign.classroom.family import NAMES, RECIPES, load_pico, load_tokenizer, short

__all__ = ["NAMES", "RECIPES", "SUBJECTS", "items", "load_pico", "load_tokenizer", "short", "task_data", "write_data"]
