"""C as text: identifiers, numbers, arrays and comments that any C99 compiler reads back exactly."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from thrifty.errors import DataError

Array = npt.NDArray[Any]

WIDTH = 110

# C99, what C++ would refuse in a header, the types that we use, and what compilers predefine as macros.
RESERVED = """
    auto break case char const continue default do double else enum extern float for goto if inline
    int long register restrict return short signed sizeof static struct switch typedef union
    unsigned void volatile while alignas alignof and and_eq asm bitand bitor bool catch class compl
    concept const_cast constexpr decltype delete dynamic_cast explicit export false friend mutable
    namespace new noexcept not not_eq nullptr operator or or_eq private protected public
    reinterpret_cast requires static_assert static_cast template this thread_local throw true try
    typeid typename typeof using virtual wchar_t xor xor_eq main errno NULL EOF intptr_t uintptr_t
    intmax_t uintmax_t size_t ptrdiff_t offsetof linux unix i386 arm
"""
KEYWORDS = frozenset(RESERVED.split())
STDINT = re.compile(r"u?int(_fast|_least)?\d+_t|[A-Z_0-9]+_(MIN|MAX|C|WIDTH)")

CTYPES = {
    "int8": "int8_t",
    "uint8": "uint8_t",
    "int16": "int16_t",
    "uint16": "uint16_t",
    "int32": "int32_t",
    "uint32": "uint32_t",
    "float32": "float",
}


def c_name(name: str) -> str:
    """Return a valid C identifier that resembles `name`; no keyword, no leading underscore.

    >>> c_name("features.0"), c_name("0.conv"), c_name("default"), c_name("größe")
    ('features_0', 'm0_conv', 'default_', 'gr_e')
    """
    clean = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
    if not clean or clean[0].isdigit():
        clean = "m" + clean
    return clean + "_" if clean in KEYWORDS or STDINT.fullmatch(clean) else clean


def c_names(wanted: Iterable[str], taken: Collection[str] = ()) -> list[str]:
    """Return one valid identifier for each wanted name, all different and none of them in `taken`.

    >>> c_names(["a.b", "a_b", "int"], taken={"int_"})
    ['a_b', 'a_b_2', 'int_2']
    """
    used, result = set(taken), []
    for name in wanted:
        stem = candidate = c_name(name)
        number = 2
        while candidate in used:
            candidate, number = f"{stem.rstrip('_')}_{number}", number + 1
        used.add(candidate)
        result.append(candidate)
    return result


def c_float(value: float) -> str:
    """Return the shortest decimal that reads back to the same float32. Raises DataError when not finite.

    >>> c_float(0.1), c_float(3e-7), c_float(2.0), c_float(-0.0), c_float(1e20)
    ('0.1f', '3e-07f', '2.0f', '-0.0f', '1e+20f')
    """
    number = np.float32(value)
    if not np.isfinite(number):
        raise DataError(f"the constant {value} is not a finite number; C has no literal for it")
    return f"{number!s}f"


def c_number(value: Any, ctype: str) -> str:
    """Return one literal of a C type.

    >>> c_number(-2147483648, "int32_t"), c_number(255, "uint8_t"), c_number(0.5, "float")
    ('(-2147483647 - 1)', '255', '0.5f')
    """
    if ctype == "float":
        return c_float(value)
    number = int(value)
    if ctype == "int64_t":
        return "(-9223372036854775807LL - 1)" if number == -(2**63) else f"{number}LL"
    if number == -(2**31):  # -2147483648 is an expression whose operand does not fit an int
        return "(-2147483647 - 1)"
    return f"{number}u" if number > 2**31 - 1 else str(number)


def c_values(values: Array, ctype: str) -> str:
    """Return the elements as literals, comma separated, in lines of at most 110 characters."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if ctype == "float":
        bad = np.flatnonzero(~np.isfinite(flat))
        if bad.size:
            raise DataError(f"a constant has {bad.size} non-finite value(s), the first is {flat[bad[0]]}")
    return _wrap([c_number(v, ctype) for v in flat.tolist()])


def _wrap(words: list[str]) -> str:
    lines: list[str] = []
    line: list[str] = []
    width = 4
    for word in words:
        if line and width + len(word) + 1 > WIDTH:
            lines.append("    " + " ".join(line))
            line, width = [], 4
        line.append(word + ",")
        width += len(word) + 2
    return "\n".join([*lines, "    " + " ".join(line)])


def c_array(name: str, values: Array, ctype: str) -> str:
    """Return the definition of a constant array.

    >>> print(c_array("w", np.array([1, -2], np.int8), "int8_t"))
    static const int8_t w[2] = {
        1, -2,
    };
    """
    return f"static const {ctype} {name}[{values.size}] = {{\n{c_values(values, ctype)}\n}};"


def itemsize(ctype: str) -> int:
    """Return the bytes of an element of a C type of this module.

    >>> itemsize("int16_t"), itemsize("float")
    (2, 4)
    """
    return 4 if ctype == "float" else int(re.sub(r"\D", "", ctype)) // 8


def comment(text: str) -> str:
    """Return text that is safe inside a C comment.

    >>> comment("a*/b")
    'a* /b'
    """
    printable = "".join(c if c.isprintable() and ord(c) < 128 else "?" for c in text)
    return printable.replace("*/", "* /").replace("/*", "/ *")


def power_or_number(scale: float) -> str:
    """Return a scale for people: as a power of two where it is one.

    >>> power_or_number(0.125), power_or_number(0.1)
    ('2^-3', '0.1')
    """
    mantissa, exponent = np.frexp(scale)
    return f"2^{int(exponent) - 1}" if mantissa == 0.5 else f"{np.float32(scale)!s}"
