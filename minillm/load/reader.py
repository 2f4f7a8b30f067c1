"""Values of a JSON object, held to type and range: errors name the key, as the file spells it, and the rule."""

from collections.abc import Callable, Collection
from typing import Any

from minillm.errors import ConfigError, shown

# Far above any published model, and small enough that every product of them is a size a tensor can have and that the
# empty decoder of a config without its weights (`memory`, `inspect`) is built in a second.
LARGEST = 2**24


class Reader:
    """Reads and range-checks keys, and remembers which were asked for."""

    def __init__(
        self,
        raw: dict[str, Any],
        defaults: dict[str, Any],
        where: str = "config.json",
        spelled: dict[str, str] | None = None,
    ):
        self.raw, self.defaults, self.where, self.spelled, self.seen = raw, defaults, where, spelled or {}, set()

    def get(self, *names: str) -> Any:
        """The first of these keys that is in the file (also as null), else the family's default."""
        stated = [name for name in names if self.raw.get(name) is not None]
        names = tuple(word for name in names for word in (self.spelled.get(name), name) if word)
        self.seen.update(names)
        if any(self.raw[name] != self.raw[stated[0]] for name in stated):
            values = ", ".join(f"{name} {shown(self.raw[name])}" for name in stated)
            raise ConfigError(f"{self.where}: {values}: these are spellings of one value, and differ; keep one")
        for source in (self.raw, self.defaults):
            for name in names:
                if name in source:
                    return source[name]
        return None

    def value(
        self, names: tuple[str, ...], rule: str, fits: Callable[[Any], bool], default=None, optional=False
    ) -> Any:
        """A value that `fits`. Absent or null: `default`; an error that states the rule unless that or `optional`."""
        value = self.get(*names)
        value = default if value is None else value
        if not (value is None and optional) and not fits(value):
            key = self.spelled.get(names[0], names[0])
            raise ConfigError(f"{self.where}: {key} must be {rule}, not {shown(value)}")
        return value

    def integer(self, *names: str, minimum: int = 1, maximum: int = LARGEST, **absent) -> int | None:
        """A whole number within the bounds; `absent` as for `value`."""
        rule = f"a whole number from {minimum} to {maximum}"
        return self.value(names, rule, lambda value: type(value) is int and minimum <= value <= maximum, **absent)

    def number(self, *names: str, minimum: float = 1e-30, maximum: float = 1e30, **absent) -> float | None:
        """A number within the bounds, by default positive and finite."""
        rule = f"a number from {minimum:g} to {maximum:g}"
        found = self.value(names, rule, lambda v: type(v) in (int, float) and minimum <= v <= maximum, **absent)
        return None if found is None else float(found)

    def one_of(self, words: Collection[str], *names: str, **absent) -> str | None:
        rule = f"one of the supported {', '.join(words)}"
        return self.value(names, rule, lambda value: isinstance(value, str) and value in words, **absent)

    def flag(self, name: str, default: bool = False) -> bool:
        return self.value((name,), "true or false", lambda value: isinstance(value, bool), default)

    def table(self, name: str) -> dict[str, Any] | None:
        return self.value((name,), "an object", lambda value: isinstance(value, dict), optional=True)
