"""Plain values as text: all that crosses between tests and a program. No object of the program's can be built from it.

The text of this file stands above those of ``driver.py`` and ``tester.py`` on an interpreter's command line, so it
imports the standard library alone.
"""

import json
import typing

DEPTH = 60
BYTES = 4 << 20
_BASES: tuple[type, ...] = (bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict)


def pack(value: typing.Any) -> bytes:
    """A value as text; of a subclass what its plain base holds.

    Raises:
        TypeError: it, or something in it, is not plain. ValueError: it is too deep or too large.
    """
    data = json.dumps(_written(value, 0)).encode()
    if len(data) > BYTES:
        raise ValueError(f"a value of more than {BYTES} bytes cannot cross")
    return data


def unpack(data: bytes) -> typing.Any:
    """What :func:`pack` was given, of exactly the built-in types.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: no such text.
    """
    if len(data) > BYTES:
        raise ValueError("too large")
    return _read(json.loads(data), 0)


def _written(value: typing.Any, depth: int) -> typing.Any:
    if depth > DEPTH:
        raise ValueError(f"a value nested more than {DEPTH} deep cannot cross")
    base = next((b for b in _BASES if isinstance(value, b)), None)
    if value is None or base is bool:
        return value
    if base is int:
        return {"int": hex(int.__index__(value))}
    if base is float:
        return {"float": float.hex(value)}  # nan and inf too
    if base is complex:
        number = complex.__add__(value, 0j)
        return {"complex": [float.hex(number.real), float.hex(number.imag)]}
    if base is str:
        return str.__str__(value)
    if base is bytes or base is bytearray:
        return {base.__name__: bytes(memoryview(value)).hex()}
    if base is dict:
        return {"dict": [[_written(k, depth + 1), _written(v, depth + 1)] for k, v in dict.items(value)]}
    if base is None:
        raise TypeError(f"a value of type {type(value).__name__} cannot cross")
    return {base.__name__: [_written(v, depth + 1) for v in base.__iter__(value)]}  # type: ignore[attr-defined]


def _read(value: typing.Any, depth: int) -> typing.Any:
    if depth > DEPTH:
        raise ValueError("too deep")
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is not dict or len(value) != 1:
        raise ValueError("no plain value")
    ((kind, inner),) = value.items()
    if kind == "int":
        return int(inner, 16)
    if kind == "float":
        return float.fromhex(inner)
    if kind == "complex":
        return complex(*map(float.fromhex, inner))
    if kind in ("bytes", "bytearray"):
        return bytes.fromhex(inner) if kind == "bytes" else bytearray.fromhex(inner)
    if kind == "dict":
        return {_read(k, depth + 1): _read(v, depth + 1) for k, v in inner}
    build = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
    return build([_read(v, depth + 1) for v in inner])
