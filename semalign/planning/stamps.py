"""What a finished file was made from, said beside it in the name of an empty one: ``FILE.DIGEST``."""

from __future__ import annotations

from pathlib import Path

BUT_FOR = ", but for "
"""What stands in provenance between a profile's name and the values that differed from it."""


def stamp(output: Path, value: str) -> None:
    """Say that a finished file was made from what has this digest."""
    unstamp(output)
    output.with_name(f"{output.name}.{value}").touch()


def unstamp(output: Path) -> None:
    """Say nothing any more of a file that is about to be made, or that was made in another way than a run's."""
    for old in output.parent.glob(f"{output.name}.*"):
        old.unlink()


def stamped(output: Path) -> bool:
    """Whether something is said of a file."""
    return any(output.parent.glob(f"{output.name}.*"))
