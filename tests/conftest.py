"""Settings of the whole suite: two threads at most, no hub."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("MPLBACKEND", None)  # a backend that matplotlib does not know stops its import
sys.path.insert(0, str(Path(__file__).parent))
