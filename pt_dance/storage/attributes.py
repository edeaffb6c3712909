"""Attributes that are live, checked as the option of the same name is, or cannot be set once the object is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Live:
    """An attribute that may be set at any time: what is set is checked, and counts from then on.

    Args:
        check: Takes the attribute's name and the value, and returns the value to keep or raises an error.
    """

    def __init__(self, check: Callable[[str, Any], Any]) -> None:
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Return the value; of the class, the attribute itself."""
        if instance is None:
            return self
        if self.name not in vars(instance):
            raise AttributeError(f"{type(instance).__name__} has no attribute {self.name!r} yet")
        return vars(instance)[self.name]

    def __set__(self, instance: Any, value: Any) -> None:
        """Keep a value that passes the check."""
        vars(instance)[self.name] = self.check(self.name, value)


class Fixed(Live):
    """An attribute that is set once, when the object is made, since what was made then depends on it."""

    def __init__(self) -> None:
        super().__init__(lambda name, value: value)

    def __set__(self, instance: Any, value: Any) -> None:
        """Keep the first value.

        Raises:
            AttributeError: If there is one.
        """
        if self.name in vars(instance):
            kind = type(instance).__name__
            raise AttributeError(f"{self.name!r} of a {kind} is what it was made with: make a new {kind} instead")
        super().__set__(instance, value)
