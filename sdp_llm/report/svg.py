"""SVG as text."""

from __future__ import annotations

from html import escape
from importlib.resources import files

Value = str | float | int | None


def tag(name: str, *children: str, **attributes: Value) -> str:
    """An element; ``_`` in names of attributes stands for ``-``, ``class_`` for ``class``.

    :param children: markup; text goes through :func:`text` or ``html.escape`` before.
    :param attributes: numbers are written with two decimals; None leaves one out.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            shown = value if isinstance(value, str) else pixels(value)
            parts.append(f'{key.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    opening = " ".join(parts)
    return f"<{opening}>{''.join(children)}</{name}>" if children else f"<{opening}/>"


def text(content: str, x: float, y: float, **attributes: Value) -> str:
    """Text at a point."""
    return tag("text", escape(content), x=x, y=y, **attributes)


def pixels(value: float) -> str:
    """A length with two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else str(int(value))


def asset(name: str) -> str:
    """A file beside this one, such as the style sheet."""
    return (files("sdp_llm.report") / name).read_text(encoding="utf-8")


def path(points: list[tuple[float, float]]) -> str:
    """The data of a path through points."""
    return "M" + "L".join(f"{pixels(x)} {pixels(y)}" for x, y in points)
