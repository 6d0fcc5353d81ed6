"""Settings of the whole suite: two threads at most, no hub."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

LONGEST = ("test_scenario.py", "test_tasks.py")
"""Files that begin first: what begins last is waited for."""

gc.disable()  # while libraries are imported: nothing of them goes
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("MPLBACKEND", None)  # a backend that matplotlib does not know stops its import
sys.path.insert(0, str(Path(__file__).parent))


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One more than xdist counts: a fifth of the time is waiting, for programs that hang and for what is killed."""
    return (yield) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all others in their order."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """What the imports made stays: each of the transfers of this suite collects what it held, and nothing else."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _what_other_files_left() -> None:
    """What other files have left stays too: a training collects garbage three times."""
    gc.freeze()
