"""How single values of the JSON file are checked, and the wording of what is wrong with them."""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sdp_llm.errors import ConfigError

AUTO = "auto"
AUTO_KEYS = (
    "train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps and "
    "scheduler.params.total_num_steps"
)
# A float such as 0.0625 is meant as a ratio of two rank counts; no world has more ranks than this.
MAX_DENOMINATOR = 1024
# Counts end up in 64-bit integers, of torch, numpy and files.
MAX_INTEGER = 2**63 - 1
# "bfp16" is what releases of DeepSpeed before 0.19 called bf16 here.
_FRACTION = re.compile(r"[0-9]{1,9}(/[0-9]{1,9}|\.[0-9]{1,18})?")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "bfp16": "bfloat16"}


@dataclass(frozen=True)
class Kind:
    """A type of value.

    Attributes:
        name: as shown in the table of keys and in "expected ..." messages.
        parse: `(path, value) -> value`; raises ConfigError for what the kind does not allow.
        dump: from the parsed value back to JSON.
    """

    name: str
    parse: Callable[[str, Any], Any]
    dump: Callable[[Any], Any] = lambda value: value


def wrong(path: str, value: object, rule: str) -> ConfigError:
    """The error for a value that breaks `rule`."""
    return ConfigError(f"{path} = {_shown(value)}: {rule}")


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate closest to `name`, ignoring case, or None when none is close."""
    by_folded = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), by_folded, n=1)
    return by_folded[close[0]] if close else None


def unknown(path: str, known: Sequence[str], elsewhere: str | None = None) -> ConfigError:
    """The error for a key that nobody knows.

    :param path: the full path of the key.
    :param known: names of the keys that exist beside it.
    :param elsewhere: full path of a key of exactly this name in another section.
    """
    parent, _, name = path.rpartition(".")
    close = nearest(name, known)
    path = shorten(path)
    if elsewhere is not None or close is not None:
        suggestion = elsewhere or (f"{parent}.{close}" if parent else close)
        return ConfigError(f"{path}: unknown key; did you mean {suggestion}?")
    return ConfigError(f"{path}: unknown key; known keys here are {', '.join(known)}")


def is_number(value: object) -> bool:
    """Whether the value is a finite number that a float can hold; a bool is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def integer(minimum: int, maximum: int = MAX_INTEGER) -> Kind:
    """An integer from `minimum` to `maximum`; a float such as 5e8 counts if it is whole."""
    names = {0: "integer ≥ 0", 1: "positive integer"}
    name = names.get(minimum, f"integer ≥ {minimum}")

    def parse(path: str, value: Any) -> int:
        if not is_number(value) or value != int(value) or value < minimum:
            raise wrong(path, value, f"expected {_article(name)}{_unquoted(value)}")
        if value > maximum:
            raise wrong(path, value, f"too large; use at most {maximum}")
        return int(value)

    return Kind(name, parse)


def number(minimum: float = -math.inf, *, above: float = -math.inf) -> Kind:
    """A finite number with `minimum <= value` and `above < value`."""
    limits = [
        *([f"≥ {minimum:g}"] if math.isfinite(minimum) else []),
        *([f"> {above:g}"] if math.isfinite(above) else []),
    ]
    name = " ".join(["number", " and ".join(limits)]).strip()

    def parse(path: str, value: Any) -> int | float:
        if not is_number(value) or not (minimum <= value and above < value):
            raise wrong(path, value, f"expected {_article(name)}{_unquoted(value)}")
        return value

    return Kind(name, parse)


def choice(*values: str) -> Kind:
    """One of a few strings."""
    name = " or ".join(f'"{value}"' for value in values)

    def parse(path: str, value: Any) -> str:
        if value not in values:
            close = nearest(value, values) if isinstance(value, str) else None
            hint = f'; did you mean "{close}"?' if close else ""
            raise wrong(path, value, f"expected {name}{hint}")
        return str(value)

    return Kind(name, parse)


def each(kind: Kind) -> Kind:
    """A list of values of a kind."""
    name = f"list, each entry {_article(kind.name)}"

    def parse(path: str, value: Any) -> list[Any]:
        if not isinstance(value, list | tuple):
            raise wrong(path, value, f"expected a {name}")
        return [kind.parse(f"{path}[{i}]", entry) for i, entry in enumerate(value)]

    return Kind(name, parse)


def one_or_each(kind: Kind) -> Kind:
    """A value of a kind, or a list of them, one for each parameter group."""

    def parse(path: str, value: Any) -> Any:
        is_list = isinstance(value, list | tuple)
        return (each(kind) if is_list else kind).parse(path, value)

    return Kind(f"{kind.name} or a list", parse)


def _parse_boolean(path: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(path, value, "expected true or false, without quotes")
    return value


def _parse_string(path: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise wrong(path, value, "expected a string that is not empty")
    return _parse_any_string(path, value)


def _parse_any_string(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(path, value, "expected a string")
    if not value.isprintable():
        raise wrong(path, value, "has a character that cannot be printed; remove it")
    return value


def _parse_corpora(path: str, value: Any) -> str | dict[str, float]:
    if isinstance(value, str) and value.strip():
        return _parse_any_string(path, value)
    if not isinstance(value, Mapping) or not value:
        rule = (
            'expected a path, or an object of paths and weights such as {"data/a": 3, "data/b": 1}'
        )
        raise wrong(path, value, rule)
    for prefix, weight in value.items():
        where = f"{path}[{json.dumps(prefix)}]"
        if not isinstance(prefix, str) or not prefix.strip():
            raise wrong(where, weight, "the path is empty; name the corpus without .bin and .idx")
        if not is_number(weight) or weight <= 0:
            raise wrong(where, weight, "expected a weight > 0; remove a corpus that is not wanted")
        _parse_any_string(path, prefix)
    return dict(value)


def _parse_betas(path: str, value: Any) -> list[float]:
    inside = isinstance(value, list | tuple) and all(is_number(b) and 0 <= b < 1 for b in value)
    if not inside or len(value) != 2:
        raise wrong(path, value, "expected a pair of numbers ≥ 0 and < 1, as in [0.9, 0.95]")
    return list(value)


def _parse_coverage(path: str, value: Any) -> Fraction:
    return _parse_share(path, value, MAX_DENOMINATOR)


def _parse_share(path: str, value: Any, max_denominator: int | None = None) -> Fraction:
    rule = 'expected a number > 0 and ≤ 1, or a fraction as a string such as "1/3"'
    fraction = None
    if isinstance(value, Fraction):
        fraction = value
    elif isinstance(value, str) and _FRACTION.fullmatch(value.strip()):
        numerator, _, denominator = value.partition("/")
        if not denominator or int(denominator):
            fraction = Fraction(numerator) / int(denominator or 1)
    elif is_number(value):
        fraction = Fraction(str(value))
        if max_denominator is not None:
            fraction = fraction.limit_denominator(max_denominator)
    if fraction is None or not 0 < fraction <= 1:
        raise wrong(path, value, rule)
    return fraction


def _dump_share(share: Fraction) -> str | float:
    """What :func:`_parse_share` reads as the same again."""
    text = str(share)
    return text if _FRACTION.fullmatch(text) else float(share)


def _parse_owner_sets(path: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list | tuple) or not value:
        raise wrong(path, value, "expected a list of lists of ranks, one for each block")
    rank = integer(0)
    sets = []
    for block, owners in enumerate(value):
        where = f"{path}[{block}]"
        if not isinstance(owners, list | tuple) or not owners:
            raise wrong(where, owners, "expected the list of ranks that own this block")
        ranks = tuple(rank.parse(f"{where}[{i}]", owner) for i, owner in enumerate(owners))
        if len(set(ranks)) != len(ranks):
            raise wrong(where, owners, "a rank is named twice; name each owner once")
        sets.append(tuple(sorted(ranks)))
    return tuple(sets)


def _parse_communication_dtype(path: str, value: Any) -> str:
    name = value.lower() if isinstance(value, str) else ""
    if name == "fp16":
        raise wrong(path, value, 'not supported together with SDP; use "bf16" or "fp32"')
    if name not in _DTYPES:
        raise wrong(path, value, 'expected "fp32" or "bf16"')
    return _DTYPES[name]


def dump_communication_dtype(value: str) -> str:
    """DeepSpeed's short name of a dtype."""
    return {"float32": "fp32", "bfloat16": "bf16"}[value]


POSITIVE = integer(1)
COUNT = integer(0)
BOOLEAN = Kind("true or false", _parse_boolean)
STRING = Kind("string", _parse_string)
ANY_STRING = Kind("string", _parse_any_string)
CORPORA = Kind("string or {string: weight}", _parse_corpora)
BETAS = Kind("pair of numbers", _parse_betas)
SHARE = Kind('number or "a/b"', _parse_share, _dump_share)
COVERAGE = Kind('number or "a/b"', _parse_coverage, str)
OWNER_SETS = Kind(
    "list of lists of ranks", _parse_owner_sets, lambda sets: [list(owners) for owners in sets]
)
COMMUNICATION_DTYPE = Kind('"fp32" or "bf16"', _parse_communication_dtype, dump_communication_dtype)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _shown(value: object) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"  # no JSON: nothing but its type is safe to show
    return shorten(text)


def shorten(text: str) -> str:
    """The text, or its beginning where it is too long for a message."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unquoted(value: object) -> str:
    """The fix for a number that was given as text, as in "1e-4"."""
    try:
        is_number_in_quotes = isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        is_number_in_quotes = False
    return ", without quotes" if is_number_in_quotes else ""
