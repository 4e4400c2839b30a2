"""Tables of entries that are open from outside: what a package offers under an entry point is an entry like our own."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from rankfold.errors import InputError

Entry = TypeVar("Entry")


class UnknownEntryError(InputError, KeyError):
    """A name that a table does not hold, or that cannot be loaded."""

    def __str__(self) -> str:
        """The message as it is, which `KeyError` would put in quotes."""
        return str(self.args[0])


class Registry(MutableMapping[str, Entry], Generic[Entry]):
    """Entries by name: those of this package, and those that installed packages offer.

    An entry of another package is loaded when the table is asked for it, so an import costs nothing, and a broken
    plug-in disturbs only whoever asks for it.

    >>> table = Registry("rankfold.nothing", {"one": 1})
    >>> table["one"], "two" in table, list(table)
    (1, False, ['one'])
    """

    def __init__(self, group: str, entries: Mapping[str, Entry] | None = None, later: Mapping[str, str] | None = None):
        """A table.

        Args:
            group: Name of the entry points under which packages offer entries.
            entries: Our own.
            later: Our own that live in rooms above this one, as `module:name`.
        """
        self.group = group
        self._entries: dict[str, Entry] = dict(entries or {})
        self._later: dict[str, str] = dict(later or {})
        self._asked = False

    def _names(self) -> dict[str, str]:
        """Where entries lie that are not loaded yet."""
        if not self._asked:
            self._asked = True
            for point in entry_points(group=self.group):
                self._later.setdefault(point.name, point.value)
        return self._later

    def __getitem__(self, name: str) -> Entry:
        """The entry of a name.

        Raises:
            ValueError: If there is none, or the package that offers it cannot be loaded.
        """
        if name not in self._entries:
            if name not in self._names():
                raise UnknownEntryError(
                    f"There must be an entry {name!r} in {self.group}, but there are {', '.join(self)}."
                )
            module, _, attribute = self._later[name].partition(":")
            try:
                self._entries[name] = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                raise UnknownEntryError(
                    f"{name}: the package that offers it under {self.group} cannot be loaded ({error}). Install it "
                    "again, or remove it."
                ) from error
        return self._entries[name]

    def __setitem__(self, name: str, entry: Entry) -> None:
        """Add an entry for this process, or replace one."""
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        """Remove an entry for this process."""
        self._entries.pop(name, None)
        self._later.pop(name, None)

    def __contains__(self, name: object) -> bool:
        """Whether there is an entry, loaded or not."""
        return name in self._entries or name in self._names()

    def __iter__(self) -> Iterator[str]:
        """Names, our own first."""
        return iter(dict.fromkeys([*self._entries, *self._names()]))

    def loadable(self) -> dict[str, Entry]:
        """The entries that can be loaded: a broken plug-in disturbs only whoever asks for it by name."""
        found = {}
        for name in self:
            with suppress(UnknownEntryError):
                found[name] = self[name]
        return found

    def __len__(self) -> int:
        """Number of entries."""
        return len(list(iter(self)))

    def __repr__(self) -> str:
        """The names."""
        return f"{self.group}: {', '.join(self)}"
