"""Bad input gets one line that names the parameter, its value and what is allowed."""

import math
import numbers


def check(ok, name, value, allowed):
    """Raise ValueError naming the parameter, its value and what is allowed, unless `ok`."""
    if not ok:
        raise ValueError(f"{name}={value!r} is not allowed; allowed: {allowed}")


def verify(what, error, limit):
    """Print a check of a notebook that holds; AssertionError with its name and error where it does not (or is NaN)."""
    error = float(error.detach() if hasattr(error, "detach") else error)
    assert error <= limit, f"{what}: error {error:.1e} is above {limit:.0e}"
    print(f"✓ {what} (max error {error:.1e})")


def is_count(value, least=1):
    """True for a whole number (not a bool) of at least `least`."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least


def is_number(value):
    """True for a finite int or float, also NumPy's (not a bool)."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_count(value, name, least=1):
    """ValueError unless `value` is a whole number of at least `least`; returns it."""
    check(is_count(value, least), name, value, f"a whole number of at least {least}")
    return int(value)


def check_share(value, name, least=0.0, most=1.0, open_below=True):
    """ValueError unless `value` is a number in (least, most], or in [least, most] with open_below=False; returns it."""
    ok = is_number(value) and (least < value if open_below else least <= value) and value <= most
    check(ok, name, value, f"a number {'above' if open_below else 'of at least'} {least:g} and at most {most:g}")
    return float(value)
