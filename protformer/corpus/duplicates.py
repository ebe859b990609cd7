"""What happens to an id that was there before: refuse it, rename it, or drop its record.

In: ids in order of reading. Out: the ids to use. Memory grows with the number of ids.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from protformer.corpus.compression import Source, describe_source, is_stdin
from protformer.errors import InputError

OnDuplicate = Literal["error", "suffix", "first", "allow"]
"""For an id that was there before: refuse; append _2, _3 ...; keep the first; keep all, no list of ids."""

_SHOWN_CHARACTERS = 60


class UniqueIds:
    """Decides on one id after another, over all sources of a run.

    `all_ids` are the ids that all sources have, if they could be read before: a new id avoids them. Without
    them, an id that comes after it was given to a duplicate is refused.
    """

    def __init__(self, on_duplicate: OnDuplicate, source_names: Sequence[str], all_ids: set[str] | None) -> None:
        self._on_duplicate = on_duplicate
        self._source_names = source_names
        self._all_ids = all_ids or set()
        # Source and line in one integer (line * number of sources + source) take half the memory of a pair.
        self._places: dict[str, int] = {}
        self._last_suffix: dict[str, int] = {}
        self._given: set[str] = set()

    def take(self, name: str, source: int, line: int) -> str | None:
        """The id to use for a record, or None to drop it; `source` counts from 0. Raises InputError."""
        count = len(self._source_names)
        place = self._places.setdefault(name, line * count + source)
        if place == line * count + source and name not in self._given:
            return name
        if self._on_duplicate == "first":
            return None
        if self._on_duplicate == "suffix" and name not in self._given:
            return self._new_id(name)
        raise InputError(self._describe(name, source, line, place))

    def _new_id(self, name: str) -> str:
        number = self._last_suffix.get(name, 1) + 1
        while (new := f"{name}_{number}") in self._places or new in self._all_ids:
            number += 1
        self._last_suffix[name] = number
        self._given.add(new)
        return new

    def _describe(self, name: str, source: int, line: int, place: int) -> str:
        where = f"{self._source_names[source]}: record {quote(name)}, line {line}"
        if name in self._given:
            return f"{where}: the id was given to a duplicate further up; give a file instead of a pipe"
        first_line, first_source = divmod(place, len(self._source_names))
        of_file = "" if first_source == source else f" of {self._source_names[first_source]}"
        return (
            f"{where}: duplicate id, first on line {first_line}{of_file}; make the ids differ, "
            "or choose --on-duplicate suffix or first"
        )


def reads_twice(sources: Sequence[Source]) -> bool:
    """Whether all sources are regular files or token stores, which can be read once more."""
    return all(not is_stdin(source) and (Path(source).is_file() or Path(source).is_dir()) for source in sources)


def refuse_repeated_sources(sources: Sequence[Source]) -> None:
    """Raise InputError where one file is given twice."""
    places = [str(source) if is_stdin(source) else os.path.realpath(source) for source in sources]
    for number, (source, place) in enumerate(zip(sources, places, strict=True)):
        if place in places[:number]:
            raise InputError(f"--fasta {describe_source(source)}: is given twice; leave one out")


def quote(text: str) -> str:
    """Text from a file as messages show it: in quotation marks, on one line, not too long."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")
