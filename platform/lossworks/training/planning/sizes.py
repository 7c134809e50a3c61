"""Sizes of memory as people write and read them."""

import re

from lossworks.errors import UserError

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def read_size(text: str, option: str) -> int:
    """Return the bytes that a text such as ``16GiB`` or ``80 GB`` says.

    Args:
        text: A number above 0 and a unit: B, KiB, MiB, GiB, TiB, or KB, MB, GB, TB of powers of ten.
        option: What messages call it.

    Raises:
        UserError: It says no size.
    """
    units = {**_UNITS, **_DECIMAL}
    by_lower = {unit.lower(): size for unit, size in units.items()}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)", text.strip())
    if found is None or found[2].lower() not in by_lower or not float(found[1]):
        raise UserError(
            f"{option} {text}: must be a number above 0 and a unit, such as 16GiB; units: {', '.join(units)}"
        )
    return int(float(found[1]) * by_lower[found[2].lower()])


def size_in_words(size: float) -> str:
    """Return bytes as a number of three digits and a unit, such as ``1.25 GiB``."""
    unit = max((unit for unit in _UNITS if _UNITS[unit] <= size), key=_UNITS.__getitem__, default="B")
    number = size / _UNITS[unit]
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
