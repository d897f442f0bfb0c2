"""Mutations of files as accidents, other programs and hands make them, for the tests of what reads files."""

from __future__ import annotations

import copy
import json
import random
import string
from typing import Any

import numpy as np

from skillfast import files

Draw = random.Random

HUGE = 10**400
_RAW = {"@inf": "1e999", "@deep": "[" * 5000, "@nan": "NaN", "@minus": "-Infinity", "@half": '"\\ud800"'}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 7.25, 1e300, -1e300, 2**31, 2**62, 2**63, -(2**63) - 1, HUGE, "", "x",
    "label", "../x", "a\nb", "\x00", "é" * 300, [], [0], [[]], [None], {}, {"": 0}, {"x": 1},
    "@inf", "@deep", "@nan", "@minus",
    "@half", "skillfast.bench/1", [1, 2], ["a", "a"], [-1], [2**40],
)  # fmt: skip


def _value(draw: Draw) -> Any:
    """One of the values; a copy, which another change may change."""
    return copy.deepcopy(draw.choice(VALUES))


def _place(draw: Draw, value: Any) -> tuple[Any, ...]:
    """Where a value is, as keys and indices: a walk that ends at any depth, in lists mostly near their start."""
    place: list[Any] = []
    while isinstance(value, dict | list) and value and draw.random() < (0.85 if place else 0.97):
        last = draw.choice((len(value), 4, 2))
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(min(len(value), last))
        place.append(key)
        value = value[key]
    return tuple(place)


def changed_json(draw: Draw, value: Any) -> str:
    """JSON text of a value with one to three changes; the value is changed, too."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = _changed(draw, value)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    for word, raw in _RAW.items():
        text = text.replace(json.dumps(word), raw)
    return text


def _changed(draw: Draw, value: Any) -> Any:
    place = _place(draw, value)
    if not place:
        return _value(draw) if draw.random() < 0.3 else _inside(draw, value)
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    old, how = parent[place[-1]], draw.randrange(8)
    if how == 0 and isinstance(parent, dict):
        del parent[place[-1]]
    elif how == 1 and isinstance(parent, dict):
        parent[draw.choice((f"{place[-1]}x", "x", "schema", ""))] = parent.pop(place[-1])
    elif how == 2:
        found = value
        for key in _place(draw, value):
            found = found[key]
        parent[place[-1]] = copy.deepcopy(found)
    elif how == 3 and isinstance(old, int | float) and not isinstance(old, bool):
        parent[place[-1]] = draw.choice((-old, old + 1, old - 1, old * 2, old // 3, old * 10**6, "@nan"))
    elif how == 4 and isinstance(old, str):
        parent[place[-1]] = draw.choice((old + "x", old[:-1], old.upper(), old.replace("1", "2"), old * 50, ""))
    elif how < 6 and isinstance(old, dict | list):
        parent[place[-1]] = _inside(draw, old)
    else:
        parent[place[-1]] = _value(draw)
    return value


def _inside(draw: Draw, value: Any) -> Any:
    """A dict with a key more or in another order, a list with an item more, less or elsewhere."""
    if isinstance(value, dict):
        items = [*value.items(), *([(draw.choice(("x", "", "schema", "type")), _value(draw))])]
        draw.shuffle(items)
        return dict(items)
    if isinstance(value, list) and value:
        i = draw.randrange(len(value))
        return draw.choice((value[:i], value + value[i : i + 1], value[::-1], value[:i] + value[i + 1 :]))
    return _value(draw)


def changed_bytes(draw: Draw, raw: bytes) -> bytes:
    """Bytes that are cut off, flipped, put in, left out or of another file."""
    made = bytearray(raw)
    how = draw.randrange(6)
    at = draw.randrange(len(made) + 1)
    if how == 0:
        return bytes(made[:at])
    if how == 1 and made:
        for _ in range(draw.choice((1, 1, 2, 8))):
            made[draw.randrange(len(made))] ^= 1 << draw.randrange(8)
    elif how == 2:
        made[at:at] = draw.choice((b"\x00", b"\xff\xfe", b"}", b'"', b",", b"\n", b"\xef\xbb\xbf", b"9", b"-", b"e"))
    elif how == 3:
        del made[at : at + draw.choice((1, 2, 8, 100))]
    elif how == 4:
        made[at : at + 8] = bytes(draw.randrange(256) for _ in range(8))
    else:
        return draw.choice((b"", b"{}", b"[]", b"\x00" * 64, b"\x80\x04N.", bytes(made) * 2, b"PK\x03\x04", b"null"))
    return bytes(made)


def parts_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def changed_tensors(draw: Draw, raw: bytes) -> bytes:
    """A safetensors file: damaged, with another header, or well formed with other tensors than it should have."""
    how = draw.randrange(10)
    header, data = parts_of(raw)
    if how == 0:
        return changed_bytes(draw, raw)
    if how == 1:
        length = draw.choice((0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, len(raw), draw.randrange(len(raw))))
        return length.to_bytes(8, "little") + raw[8:]
    if how == 2:
        return _file(changed_json(draw, header).encode("utf-8", "surrogatepass"), data)
    metadata = header.get("__metadata__", {})
    if how < 7 and "skillfast" in metadata:
        metadata["skillfast"] = changed_json(draw, json.loads(metadata["skillfast"]))
        return _file(json.dumps(header).encode(), data)
    return other_tensors(draw, header, data)


def _file(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


_NUMPY = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BOOL": "?", "U8": "u1", "U16": "u2", "U64": "u8", "I32": "i4", "I64": "i8",
}  # fmt: skip
_KINDS = {dtype: kind for kind, dtype in _NUMPY.items()}


def other_tensors(draw: Draw, header: dict[str, Any], data: bytes) -> bytes:
    """A well-formed file with right checksums, of which one tensor has another type, shape, name or values."""
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name, told in header.items():
        start, end = told["data_offsets"]
        arrays[name] = np.frombuffer(data[start:end], _NUMPY[told["dtype"]]).reshape(told["shape"])
    name = draw.choice(sorted(arrays))
    array = arrays.pop(name).copy()
    how = draw.randrange(7)
    if how == 0:
        array = array.astype(draw.choice([kind for kind in _KINDS if kind != "?"]))
    elif how == 1 and array.ndim:
        array = np.delete(array, draw.randrange(len(array)), 0) if len(array) else np.zeros((1, *array.shape[1:]))
    elif how == 2:
        array = draw.choice((array.reshape(-1), array[None], array.T.copy(), array[..., None]))
    elif how == 3 and array.size:
        value = draw.choice((np.nan, np.inf, -np.inf, -1, 2**31 - 1, 1e30, 255, -1e9, 0, 1000))
        with np.errstate(all="ignore"):
            array.reshape(-1)[draw.randrange(array.size)] = np.asarray(value).astype(array.dtype)
    elif how == 4 and array.size:
        array[...] = array.reshape(-1)[draw.randrange(array.size)]
    elif how == 5:
        arrays[draw.choice(("x", f"routed.{name}", f"{name}/x", "donors", "n_routed"))] = array
    if how != 6:
        arrays[name] = array
    header = json.loads(metadata.get("skillfast", "null"))
    if isinstance(header, dict) and "crc32" in header:
        header["crc32"] = {name: files.checksum(array) for name, array in arrays.items()}
        metadata["skillfast"] = json.dumps(header)
    offset, told = 0, {}
    for name, array in arrays.items():
        told[name] = {
            "dtype": _KINDS.get(array.dtype.str[1:], "BOOL"),
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    made = {"__metadata__": metadata, **told} if metadata else told
    return _file(json.dumps(made).encode(), b"".join(array.tobytes() for array in arrays.values()))


def changed_toml(draw: Draw, tables: dict[str, Any]) -> bytes:
    """A gate with one to three changes."""
    if draw.random() < 0.3:
        return changed_bytes(draw, as_toml(tables).encode())
    value = tables
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = _changed(draw, json.loads(json.dumps(value)))
    return as_toml(value if isinstance(value, dict) else {"x": value}).encode("utf-8", "surrogatepass")


def as_toml(tables: dict[str, Any]) -> str:
    """One inline table a line."""
    return "".join(f"{_quoted(key)} = {_toml(value)}\n" for key, value in tables.items())


def _quoted(text: str) -> str:
    return json.dumps(text)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(str(key))} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    words = {"@inf": "inf", "@nan": "nan", "@minus": "-inf", "@deep": "[" * 2000, "@half": '"\\ud800"'}
    if isinstance(value, str) and value in words:
        return words[value]
    return {None: '""', True: "true", False: "false"}.get(value) or (
        _quoted(value) if isinstance(value, str) else str(value)
    )


def changed_lines(draw: Draw, text: str) -> bytes:
    """A table of text: damaged, or with other lines and fields."""
    if draw.random() < 0.4:
        return changed_bytes(draw, text.encode())
    lines = text.split("\n")
    i = draw.randrange(len(lines))
    how = draw.randrange(5)
    if how == 0:
        del lines[i]
    elif how == 1:
        lines[i] = lines[i][: draw.randrange(len(lines[i]) + 1)]
    elif how == 2:
        lines.insert(i, draw.choice(lines))
    elif how == 3:
        junk = draw.choice(['"', ",", "\t", "{", "null", "1e999", "NaN", '{"text": 1}', "9" * 5000, "[" * 5000, "\r"])
        lines[i] = junk + lines[i] if draw.random() < 0.5 else junk
    elif lines[i].startswith("{"):
        lines[i] = changed_json(draw, json.loads(lines[i]))
    else:
        lines[i] += draw.choice(string.printable)
    return "\n".join(lines).encode("utf-8", "surrogatepass")
