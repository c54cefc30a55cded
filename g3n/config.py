"""Typed, strict configuration: dataclass defaults < YAML < ``key=value``, unknown keys refused with "did you mean".

Every component owns a frozen dataclass beside its code; ``build`` turns a plain mapping into one. Ranges are checked in
each dataclass's ``__post_init__`` by raising ``ValueError``; ``build`` puts the key's path in front.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class G3nError(Exception):
    """A user's mistake or damaged input: one line that names the thing, what was expected, and what to do. Exit code 2."""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """``"; did you mean 'x'?"`` for a near miss among ``known``, else the list of what exists."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file, merge ``key.sub=value`` overrides over it, resolve ``${...}``; a plain nested dict.

    Raises G3nError for a missing file, bad YAML, or an override without ``=``.
    """
    path = Path(path)
    if not path.is_file():
        raise G3nError(f"config '{path}' does not exist; shipped ones are under configs/")
    for item in overrides:
        if "=" not in item:
            raise G3nError(f"override '{item}' has no '='; write key.sub=value, for example optim.lr=1e-4")
    try:
        conf = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        raw = OmegaConf.to_container(conf, resolve=True)
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise G3nError(f"config '{path}' cannot be read: {_first_line(error)}") from error
    except Exception as error:  # PyYAML's errors share no public base with OmegaConf's
        if type(error).__module__.startswith("yaml"):
            raise G3nError(f"config '{path}' is not valid YAML: {_first_line(error)}") from error
        raise
    if not isinstance(raw, dict):
        raise G3nError(f"config '{path}' must be a mapping of keys, found {type(raw).__name__}")
    return typing.cast(dict[str, Any], raw)


def write_yaml(tree: Any) -> str:
    """YAML text of a dataclass or mapping; ``build`` of what is read back gives the same object."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(tree)))


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as dicts and lists of plain scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value


def build(schema: type[T], raw: Any, path: str = "", sections: Mapping[str, type] | None = None) -> T:
    """Build the frozen dataclass ``schema`` from a mapping, strictly.

    ``sections`` names the dataclass of top-level fields whose type depends on another key (``model`` on ``task``).
    Raises G3nError naming the full key for unknown or missing keys, wrong types and values out of range.
    """
    if not isinstance(raw, Mapping):
        raise G3nError(f"config key '{path or '(top)'}' must be a mapping of {schema.__name__}, found {raw!r}")
    hints = typing.get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, schema)) if f.init}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in fields:
            raise G3nError(f"unknown config key '{full}'{did_you_mean(str(key), list(fields))}")
        kind = (sections or {}).get(key, hints[key])
        values[key] = _convert(kind, value, full)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise G3nError(f"missing config key '{path + '.' if path else ''}{name}' ({_describe(hints[name])})")
    try:
        return schema(**values)
    except ValueError as error:
        raise G3nError(f"config key '{path or '(top)'}': {error}") from error


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for option in args:
            if option is type(None):
                continue
            try:
                return _convert(option, value, path)
            except G3nError:
                continue
    elif kind is Any:
        return value
    elif origin is typing.Literal:
        if value in args:
            return value
        raise G3nError(
            f"config key '{path}' is {value!r}; allowed: {', '.join(map(str, args))}"
            + (did_you_mean(value, [str(a) for a in args]) if isinstance(value, str) and value else "").split(
                "; known"
            )[0]
        )
    elif dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, path)
    elif origin is tuple and isinstance(value, (list, tuple)):
        item_kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(item_kinds) == len(value):
            return tuple(_convert(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(item_kinds, value, strict=True)))
    elif origin in (dict, Mapping) or kind is dict:
        if isinstance(value, Mapping):
            item = args[1] if args else Any
            return {str(k): _convert(item, v, f"{path}.{k}") for k, v in value.items()}
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise G3nError(f"config key '{path}' is a whole number too large for a float") from None
    elif kind is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as a string
        except ValueError:
            pass
    elif (kind is int and isinstance(value, int) and not isinstance(value, bool)) or (
        kind in (str, bool) and isinstance(value, kind)
    ):
        return value
    raise G3nError(f"config key '{path}' is {value!r}; expected {_describe(kind)}")


def _describe(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
