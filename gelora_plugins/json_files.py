"""Reading and writing the saved records: JSON only, checked on the way in, written whole or not at all."""

import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gelora_plugins.errors import PlanError, WriteError

SCHEMA = 1
MAX_INT = 2**53  # larger ones are not exact in every reader of JSON, and overflow where they are divided
MAX_BYTES = 64 * 2**20  # of a record: that of a model with 1000 blocks has a few


def is_number(value: Any) -> bool:
    """True for an int or float that fits a finite float; JSON as Python reads it has NaN and Infinity too."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def reader(data: Any, where: str, kind: str | None = None, keys: Sequence[str] | None = None) -> Callable[..., Any]:
    """A function `get(key, type, null=False, since=False)` that reads `data[key]` and checks its type.

    `null` allows None; `since` says that earlier versions did not write the key, and gives None where it is missing.
    Every other key must be there, because every record is written with all of them, and with `keys`, which a record
    that has such a key needs, no key but these: a misspelt one would read as missing. Numbers must be finite and, for
    int, from 0 to MAX_INT: no record of GeLoRA holds others.

    Raises:
        PlanError: `data` is not a mapping, has another `kind`, an unknown schema or an unknown key; or, from `get`, a
            missing key or a value of another type.
    """
    if not isinstance(data, dict):
        raise PlanError(f"{where} is a {type(data).__name__}; expected a mapping.")
    if kind is not None:
        if data.get("kind") != kind:
            raise PlanError(f"{where} has kind {data.get('kind')!r}; expected {kind!r}.")
        if data.get("schema") != SCHEMA:
            raise PlanError(
                f"{where} has schema {data.get('schema')!r}; this version of gelora reads schema {SCHEMA}. "
                "Make it again with this version, or install the version that wrote it."
            )

    known = set(data) if keys is None else {*keys, "schema", "kind"}
    for key in data:
        if key not in known:
            raise PlanError(
                f"{where}.{key} is not a key that this version of gelora knows. Make it again with this version, or "
                "install the version that wrote it."
            )

    def get(key: str, type_: type, null: bool = False, since: bool = False) -> Any:
        if key not in data and since:
            return None
        if key not in data:
            raise PlanError(f"{where}.{key} is missing.")
        value = data[key]
        if null and value is None:
            return None
        ok = isinstance(value, type_) and not (type_ is not bool and isinstance(value, bool))
        if type_ is float:
            ok = is_number(value)
        elif type_ is int:
            ok = ok and 0 <= value <= MAX_INT
        if not ok:
            raise PlanError(f"{where}.{key} is {value!r:.80}; expected {type_.__name__}.")
        return float(value) if type_ is float else value

    return get


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Raises PlanError, with the path, when it cannot be read, is too long or is not JSON."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise PlanError(f"{os.fspath(path)} has more than {MAX_BYTES >> 20} MB; expected a record of GeLoRA.")
        return json.loads(content.decode("utf-8"))
    except PlanError:
        raise  # which is a ValueError
    except OSError as error:
        raise PlanError(f"{os.fspath(path)} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{os.fspath(path)} is not JSON: {error}.") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename.

    Raises:
        WriteError: the disk is full, or the directory cannot be written to.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile, whose files only their owner can read: to give them the usual rights takes the umask, which no
        # process can read without changing it for its other threads.
        temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise WriteError(
            f"{target} cannot be written: {error.strerror or error}. What was there before is unchanged; make room, or "
            "choose a place that can be written to."
        ) from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `as_text(value)` as `write_bytes` does."""
    write_text(path, as_text(value))


def as_text(value: Any) -> str:
    """`value` as indented JSON, each list of numbers in one line.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot say.
    """
    text = json.dumps(value, indent=1, allow_nan=False)
    # JSON writes a line break in a string as an escape, so no string can look like such a list.
    return re.sub(r"\[\n[-+.eE\d,\s]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"
