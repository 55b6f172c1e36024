"""What a notebook's parameters may be, and which sizes each mode takes: declared once, checked before anything runs."""

from itertools import pairwise

from effarch.checks import check, is_count, is_number

MODES = ("quick", "full", "smoke")


class Setting:
    """One parameter: a test of a given value, and what each mode takes where the parameter is None.

    ok: value → bool; allowed: that test in words; presets: quick=…, full=…, smoke=… and, where a GPU takes another
    value in full mode, cuda=…. Without presets the parameter must be given (None only if `none` allows it)."""

    def __init__(self, ok, allowed, none=False, **presets):
        wrong = set(presets) - {*MODES, "cuda"}
        check(not wrong and (not presets or set(MODES) <= set(presets)), "presets", presets, "quick, full, smoke (and cuda)")
        self.ok, self.allowed, self.none, self.presets = ok, allowed, none, presets

    def resolve(self, name, value, mode, cuda):
        """The value to use in this mode; ValueError naming the parameter if the given one is not allowed."""
        if value is None and self.presets:
            return self.presets["cuda"] if cuda and mode == "full" and "cuda" in self.presets else self.presets[mode]
        if value is None and self.none:
            return None
        optional = "None or " if self.presets or self.none else ""
        check(self.ok(value), name, value, optional + self.allowed)
        return value


def count(least=1, most=None, **presets):
    """A whole number from `least` to `most`."""
    def ok(value):
        return is_count(value, least) and (most is None or value <= most)

    return Setting(ok, f"a whole number of at least {least}" + ("" if most is None else f" and at most {most}"), **presets)


def number(least, most=float("inf"), above=False, **presets):
    """A number from `least` (or, with `above`, greater than it) to `most`."""
    def ok(value):
        return is_number(value) and (value > least if above else value >= least) and value <= most

    allowed = f"a number {'above' if above else 'of at least'} {least:g}"
    return Setting(ok, allowed + ("" if most == float("inf") else f" and at most {most:g}"), **presets)


def share(least=0.0, most=1.0, **presets):
    """A share: a number above `least` and at most `most`."""
    return number(least, most, above=True, **presets)


def choice(*allowed, **presets):
    """One of the given values; None among them means that None may be given."""
    named = [value for value in allowed if value is not None]
    return Setting(lambda value: value in named, ", ".join(map(str, named)), none=None in allowed, **presets)


def text(allowed="a text", **presets):
    """A text that is not empty."""
    return Setting(lambda value: isinstance(value, str) and bool(value.strip()), allowed, **presets)


def listing(of, least=1, length=None, ascending=False, **presets):
    """A list whose items are as the Setting `of` wants them: at least `least` of them, or exactly `length`. ascending: each above the last."""
    def ok(value):
        right = isinstance(value, (list, tuple)) and (len(value) == length if length else len(value) >= least)
        right = right and all(of.ok(item) for item in value)
        return right and (not ascending or all(a < b for a, b in pairwise(value)))

    size = f"exactly {length}" if length else f"at least {least}"
    return Setting(ok, f"{'an ascending' if ascending else 'a'} list of {size}, each {of.allowed}", **presets)
