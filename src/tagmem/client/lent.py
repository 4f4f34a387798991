"""Who is in the way of a mapping's end: what was given out of it, without keeping that alive.

Python refuses to unmap what a view still looks at, and does not say which view that is.
"""

from __future__ import annotations

from collections.abc import Callable

NAMED_MAX = 3


class Lent:
    """Names of views and objects, for as long as they live."""

    def __init__(self) -> None:
        self._given: list[tuple[str, Callable[[], object]]] = []

    def note(self, name: str, value: object) -> None:
        """One more. What cannot be referred to weakly is a copy, and in nobody's way."""
        import weakref

        self._given = self._alive()
        try:
            self._given.append((name, weakref.ref(value)))
        except TypeError:
            return

    def named(self, otherwise: str) -> str:
        """Those that live, the first few of them by name; `otherwise` when it is none of them."""
        alive = [name for name, _ in self._alive()]
        named = ", ".join(alive[:NAMED_MAX]) or otherwise
        return named + (f" and {len(alive) - NAMED_MAX} more" if len(alive) > NAMED_MAX else "")

    def clear(self) -> None:
        """Forget them all."""
        self._given.clear()

    def _alive(self) -> list[tuple[str, Callable[[], object]]]:
        return [(name, given) for name, given in self._given if given() is not None]
