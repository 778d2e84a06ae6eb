"""Configs as canonical JSON, as flat names, and from dotted text: typed, checked, never guessed at."""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from hrs import strict_json
from hrs.errors import HRSError, shown


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts and lists that JSON can hold."""
    return dataclasses.asdict(config)


def canonical_json(config: Any) -> str:
    """Sorted keys, no spaces: equal configs give equal text."""
    return strict_json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))


def content_hash(config: Any) -> str:
    """SHA-256 of the canonical JSON, as hex."""
    return hashlib.sha256(canonical_json(config).encode()).hexdigest()


def from_dict(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
    """Rebuild a config of type ``cls`` from what :func:`to_dict` or JSON gave.

    Raises:
        HRSError: naming every unknown or mistyped field at once.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        listed = shown(", ".join(where + str(u) for u in unknown)).strip("'")
        raise HRSError(f"unknown field {listed}; {cls.__name__} has {', '.join(hints)}")
    if lacking := [f.name for f in dataclasses.fields(cls) if _is_required(f) and f.name not in values]:
        raise HRSError(f"{where.rstrip('.') or cls.__name__} lacks {', '.join(lacking)}: give all its fields")
    return cls(**{name: _coerce(hints[name], value, where + name) for name, value in values.items()})


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted leaf names to values; tuples of dataclasses are one JSON string each."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{f.name}."))
        elif isinstance(value, tuple):
            flat[prefix + f.name] = strict_json.dumps([_plain(item) for item in value], separators=(",", ":"))
        else:
            flat[prefix + f.name] = value
    return flat


def _plain(item: Any) -> Any:
    return dataclasses.asdict(item) if dataclasses.is_dataclass(item) and not isinstance(item, type) else item


# ---- overrides -------------------------------------------------------------------------------------------------------


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """``["model.n_layers=6"]`` to ``{"model.n_layers": "6"}``."""
    parsed = {}
    for text in assignments:
        key, sign, value = text.partition("=")
        if not sign:
            raise HRSError(f"override {shown(text)} must have the form FIELD=VALUE, for example model.n_layers=6")
        parsed[key.strip()] = value.strip()
    return parsed


def override(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of ``config`` with dotted fields replaced; strings are read as the field's type.

    All changes to one dataclass are made together, so two fields that only fit jointly can be changed at once.

    Raises:
        HRSError: naming every unknown or mistyped field at once.
    """
    errors: list[str] = []
    result = _override(config, changes, "", errors)
    if errors:
        raise HRSError("; ".join(errors))
    return result


def _override(config: Any, changes: Mapping[str, Any], prefix: str, errors: list[str]) -> Any:
    hints = typing.get_type_hints(type(config))
    direct: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        known = head in hints
        if known and rest and dataclasses.is_dataclass(hints[head]):
            nested.setdefault(head, {})[rest] = value
        elif known and not rest and not dataclasses.is_dataclass(hints[head]):
            try:
                direct[head] = _coerce(hints[head], value, prefix + head)
            except HRSError as error:
                errors.append(str(error))
        else:
            leaves = ", ".join(prefix + name for name in flatten(config))
            errors.append(f"unknown field {prefix}{shown(key)[1:-1]}; there are {leaves}")
    for head, inner in nested.items():
        direct[head] = _override(getattr(config, head), inner, f"{prefix}{head}.", errors)
    try:
        return dataclasses.replace(config, **direct) if not errors else config
    except HRSError as error:
        errors.append(str(error))
        return config


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type ``hint``; text from a command line or JSON is converted, never guessed at."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value in args:
            return value
        raise HRSError(f"{where} must be one of {', '.join(map(str, args))}, got {shown(value)}")
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        return _coerce_tuple(args, value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise HRSError(f"{where} must be a JSON object with the fields of {hint.__name__}, got {shown(value)}")
        return from_dict(hint, value, where + ".")
    return _coerce_scalar(hint, value, where)


def _coerce_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    wrong = HRSError(f"{where} must be a comma-separated list or JSON list, got {shown(value)}")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.startswith("[") else [v for v in value.split(",") if v]
        except (ValueError, RecursionError):
            raise wrong from None
    if not isinstance(value, list | tuple):
        raise wrong
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_coerce(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(args):
        raise HRSError(f"{where} must be a list of {len(args)} values, got {shown(value)}")
    return tuple(_coerce(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(args, value, strict=True)))


def _coerce_scalar(hint: Any, value: Any, where: str) -> Any:
    kind = "true or false" if hint is bool else f"a value of type {hint.__name__}"
    wrong = HRSError(f"{where} must be {kind}, got {shown(value)}")
    if hint is bool:
        truth = {"true": True, "false": False}.get(str(value).lower())
        if truth is None:
            raise wrong
        return truth
    if hint is str:
        if not isinstance(value, str):
            raise wrong
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise HRSError(f"{where} must be UTF-8 text, got {shown(value)}: rename it, or use a UTF-8 locale")
        return value
    if isinstance(value, bool):
        raise wrong
    try:
        number = hint(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if hint is int and isinstance(value, float) and value != number:
        raise wrong
    return number
