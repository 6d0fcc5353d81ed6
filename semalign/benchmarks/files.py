"""Files of questions: found, decoded, and refused with the file, the line and the fix where they are malformed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_ROOT = Path(__file__).resolve().parents[2]


class DataError(ValueError):
    """A file of questions is absent or malformed; the message names the file, the line and the fix."""


def folder_of(source: str | Path) -> Path:
    """The absolute path of a folder; a relative one counts from the current folder, or else from the repository's.

    Raises:
        DataError: there is no such folder; the message names the absolute path that was sought.
    """
    path = Path(source).expanduser()
    for place in (Path.cwd() / path, _ROOT / path):
        if place.is_dir():
            return place.resolve()
    also = "" if path.is_absolute() else f", nor is {_ROOT / path}"
    raise DataError(f"{Path.cwd() / path} is no folder{also}; name the folder of the questions in SEMALIGN_DATA")


def split_file(folder: Path, *names: str) -> Path:
    """The first of ``names`` that lies in ``folder``, plain or with ``.gz``; the first name where none does."""
    places = [folder / f"{name}{end}" for name in names for end in ("", ".gz")]
    return next((path for path in places if path.is_file()), places[0])


def read_text(path: Path) -> str:
    """A text in UTF-8, with or without a byte order mark, gzipped or not.

    Raises:
        DataError: the file is absent, a damaged archive, or in another encoding.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {said}; check SEMALIGN_DATA") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line} is not UTF-8 ({error.reason}); save the file as UTF-8") from None


def read_jsonl(path: Path) -> list[Row]:
    """The objects of a jsonl file, gzipped or not.

    Raises:
        DataError: the file is absent, not UTF-8, or a line is no JSON object.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number} is not JSON ({error}): write one object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number} is not a JSON object: write one object a line")
        rows.append(row)
    return rows


def typed(row: Row, kinds: Mapping[str, Any], optional: Sequence[str] = ()) -> str:
    """What is wrong with the types of a row's fields, as the end of a sentence; empty where nothing is.

    ``kinds``: a field's type; ``list`` is a list of texts. Fields in ``optional`` may be absent or None.
    """
    for name, kind in kinds.items():
        value = row.get(name)
        if name in optional and value is None:
            continue
        texts = value if kind is list and isinstance(value, list | tuple) else [value] if kind is str else ()
        if name not in row:
            return f"has no {name!r}; needed are {', '.join(k for k in kinds if k not in optional)}"
        if isinstance(value, bool) or not isinstance(value, (list, tuple) if kind is list else kind):
            return f"needs {_KINDS[kind]} as its {name!r}, not {value!r:.60}"
        for text in texts:
            if not isinstance(text, str):
                return f"needs {_KINDS[kind]} as its {name!r}, not {value!r:.60}"
            try:
                text.encode()
            except UnicodeEncodeError:
                return f"has half a character in its {name!r}: {value!r:.60}"
    return ""


_KINDS = {str: "a text", int: "a whole number", list: "a list of texts", (int, str): "a whole number or a text"}
