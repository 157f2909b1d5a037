"""Joins what all ranks say of their states to the description of one global state, and refuses what is contradictory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from shardsave._common.layouts import Grid, Joined, Layout, Listed, Placed, Whole
from shardsave._common.senders import senders
from shardsave._common.words import some
from shardsave._ranks.description import KINDS, Description, torch_dtype
from shardsave.errors import UnsupportedTensorError


class View(NamedTuple):
    """What ``ranks`` say: the number of their description, and the meshes that they mean by the numbers in it."""

    description: int
    grids: Sequence[Grid]
    ranks: Sequence[int]


class GlobalForm(NamedTuple):
    """What is known of many entries of a global state, beside their names."""

    kind: Any
    frozen: bool | None
    dtype: torch.dtype
    layout: Layout


class Global(NamedTuple):
    """A global state without its bytes. ``forms``: of each name, the number of its form in ``table``.

    ``tied_to``: name → the first name with the same memory. The rest is that of `State`.
    """

    names: Sequence[str]
    forms: Sequence[int]
    table: Sequence[GlobalForm]
    tied_to: Mapping[str, str]
    flags_known: bool
    overlaps: tuple[tuple[str, str], ...]
    files: Mapping[str, str]
    notes: tuple[str, ...]
    file_metadata: Mapping[str, str]


#: The place of a name in a description: the number of the description, and the position there.
_Place = tuple[int, int]


class Joining:
    """Joins ``descriptions``, as ``views`` of them say that ranks have them. ``rank_name``: the name of a rank, for messages."""

    def __init__(
        self, descriptions: Sequence[Description], views: Sequence[View], size: int, rank_name: Callable[[int], str]
    ) -> None:
        self._descriptions = descriptions
        self._views = views
        self._size = size
        self._rank_name = rank_name
        self._leaders = [dict(description.ties) for description in descriptions]
        self._table: list[GlobalForm] = []
        self._numbers: dict[Any, int] = {}
        self._layouts: dict[Any, Layout] = {}

    def join(self) -> Global:
        """The global state. Raises UnsupportedTensorError."""
        first, *others = self._descriptions
        if not others and not first.ties:
            return self._global(first.names, self._forms_of_one(first), {})
        places = self._places()
        same_names = all(other.names == first.names or len(other.names) == len(first.names) == len(places) for other in others)
        names = list(first.names) if same_names else sorted(places, key=_natural)
        tied_to = self._ties(places, names)
        groups: dict[str, list[str]] = {}
        for name, leader in tied_to.items():
            groups.setdefault(leader, [leader]).append(name)
        forms = []
        for name in names:
            leader = tied_to.get(name, name)
            where_whole = self._of_group([places[one] for one in groups[leader]]) if leader in groups else places[name]
            forms.append(self._form(name, places[name], where_whole))
        return self._global(names, forms, tied_to)

    def _forms_of_one(self, description: Description) -> list[int]:
        """The numbers of the global forms where all ranks say the same. Tensors of one form and one kind have the same."""
        pairs = [*zip(description.forms, description.letters)]
        numbers: dict[tuple[int, str], int] = {}
        for position, pair in enumerate(pairs):
            if pair not in numbers:
                where = ((0, position),)
                numbers[pair] = self._form(description.names[position], where, where)
        return [numbers[pair] for pair in pairs]

    def _global(self, names: Sequence[str], forms: Sequence[int], tied_to: Mapping[str, str]) -> Global:
        every = self._descriptions
        return Global(
            names,
            forms,
            self._table,
            tied_to,
            any(one.flags_known for one in every),
            tuple(dict.fromkeys(pair for one in every for pair in one.overlaps)),
            {path: name for one in every for path, name in one.files.items()},
            tuple(dict.fromkeys(note for one in every for note in one.notes)),
            self._file_metadata(),
        )

    def _places(self) -> dict[str, tuple[_Place, ...]]:
        """Where each name is described."""
        places: dict[str, tuple[_Place, ...]] = {
            name: ((0, position),) for position, name in enumerate(self._descriptions[0].names)
        }
        for number, description in enumerate(self._descriptions[1:], 1):
            for position, name in enumerate(description.names):
                places[name] = (*places.get(name, ()), (number, position))
        return places

    def _form(self, name: str, where: Sequence[_Place], where_whole: Sequence[_Place]) -> int:
        """The number of the global form of ``name``. ``where_whole``: also where only another name of the same memory is."""
        key = (
            *(
                (number, self._descriptions[number].forms[position], self._descriptions[number].letters[position])
                for number, position in where
            ),
            *(
                ()
                if where is where_whole
                else ((number, self._descriptions[number].forms[position]) for number, position in where_whole)
            ),
        )
        found = self._numbers.get(key)
        if found is None:
            self._check_equal(name, where, where_whole)
            number, position = where[0]
            form = self._descriptions[number].table[self._descriptions[number].forms[position]]
            layout = self._layout(
                name, [(number, self._descriptions[number].forms[position]) for number, position in where_whole]
            )
            kind, frozen = KINDS[self._descriptions[number].letters[position]]
            found = self._numbers[key] = len(self._table)
            self._table.append(GlobalForm(kind, frozen, torch_dtype(form.dtype), layout))
        return found

    def _check_equal(self, name: str, where: Sequence[_Place], where_whole: Sequence[_Place]) -> None:
        kinds, dtypes, shapes = {}, {}, {}
        for number, position in where:
            kinds[number] = _KIND_WORDS[self._descriptions[number].letters[position]]
        for number, position in where_whole:
            form = self._descriptions[number].table[self._descriptions[number].forms[position]]
            dtypes[number], shapes[number] = form.dtype, str(list(form.shape))
        for what, values in (("dtype", dtypes), ("shape", shapes), ("kind and freeze flag", kinds)):
            if len(set(values.values())) > 1:
                self._refuse(name, f"the same {what} on all ranks was expected", values)

    def _refuse(self, name: str, expected: str, values: Mapping[int, str]) -> NoReturn:
        """``values``: what each description says."""
        ranks: dict[str, list[int]] = {}
        for number, value in values.items():
            ranks.setdefault(value, []).extend(self._ranks_of(number))
        found = ", ".join(f"{value} on {self._words(numbers)}" for value, numbers in ranks.items())
        raise UnsupportedTensorError(f"cannot save {name!r}: {expected}, it is {found}; nothing was written")

    def _words(self, ranks: Iterable[int]) -> str:
        return some(map(self._rank_name, sorted(ranks)))

    def _ranks_of(self, description: int) -> list[int]:
        return [rank for view in self._views if view.description == description for rank in view.ranks]

    def _layout(self, name: str, forms: Sequence[tuple[int, int]]) -> Layout:
        """The layout of a tensor that has ``forms``, pairs of a description and a number in its table."""
        key = tuple(forms)
        layout = self._layouts.get(key)
        if layout is None:
            of_views = [
                (view, self._descriptions[number].table[form].layout(view.grids, view.ranks))
                for number, form in forms
                for view in self._views
                if view.description == number
            ]
            layout = self._layouts[key] = self._joined(of_views)
            self._check_covered(name, layout)
        return layout

    def _joined(self, of_views: Sequence[tuple[View, Layout]]) -> Layout:
        layouts = [layout for _, layout in of_views]
        ranks = sorted(rank for view, _ in of_views for rank in view.ranks)
        if all(isinstance(layout, Whole) for layout in layouts):
            return Whole(range(self._size) if len(ranks) == self._size else tuple(ranks), layouts[0].shape)
        if all(isinstance(layout, Listed) for layout in layouts):
            return Listed({rank: layout.boxes(rank) for layout in layouts for rank in layout.ranks}, layouts[0].shape)
        if all(layout == layouts[0] for layout in layouts) and set(layouts[0].ranks) <= set(ranks):
            return layouts[0]
        which = [-1] * self._size
        for number, (view, _) in enumerate(of_views):
            for rank in view.ranks:
                which[rank] = number
        return Joined(layouts, which)

    def _check_covered(self, name: str, layout: Layout) -> None:
        """Raises UnsupportedTensorError if some element is on no rank of the group."""
        if isinstance(layout, Whole) or (isinstance(layout, Placed) and -1 not in layout.grid.ranks):
            return
        elements = math.prod(layout.shape)
        found = (
            sum(math.prod(sizes) for _, (_, sizes) in senders(layout, layout.ranks[0], [0] * self._size)) if layout.ranks else 0
        )
        if found != elements:
            raise UnsupportedTensorError(
                f"cannot save {name!r}: all of its {elements} elements were expected on the {self._size} ranks of the group, {found} are "
                f"there; pass a process_group that has all ranks of its mesh; nothing was written"
            )

    def _of_group(self, places: Sequence[Sequence[_Place]]) -> tuple[_Place, ...]:
        """For each description, the first of the places of several names there."""
        found: dict[int, int] = {}
        for where in places:
            for number, position in where:
                found.setdefault(number, position)
        return tuple(sorted(found.items()))

    def _ties(self, places: Mapping[str, Sequence[_Place]], names: Sequence[str]) -> dict[str, str]:
        """Each tied name → the first name of its memory. A rank that sees a tie makes it one for all."""
        pairs = [(one.names[position], one.names[first]) for one in self._descriptions for position, first in one.ties]
        if not pairs:
            return {}
        order = {name: position for position, name in enumerate(names)}
        leaders: dict[str, str] = {}

        def leader(name: str) -> str:
            while (other := leaders.get(name, name)) != name:
                name = other
            return name

        for pair in dict.fromkeys(pairs):
            self._check_tie(*pair, places)
            first, second = sorted(map(leader, pair), key=order.__getitem__)
            if first != second:
                leaders[second] = first
        return {name: leader(name) for name in sorted(leaders, key=order.__getitem__)}

    def _check_tie(self, name: str, first: str, places: Mapping[str, Sequence[_Place]]) -> None:
        """Raises UnsupportedTensorError if a rank has elements of both, and they are not in the same memory there."""
        here = dict(places[first])
        tied: list[int] = []
        apart: list[int] = []
        for number, position in places[name]:
            if number not in here:
                continue
            description = self._descriptions[number]
            leader_of = self._leaders[number]
            if leader_of.get(position, position) == leader_of.get(here[number], here[number]):
                tied += self._ranks_of(number)
            else:
                apart += self._with_elements(number, description.forms[position], description.forms[here[number]])
        if apart:
            raise UnsupportedTensorError(
                f"cannot save {name!r}: memory of {first!r} was expected on all ranks, as on {self._words(tied)}, it has memory of its own "
                f"on {self._words(apart)}; nothing was written"
            )

    def _with_elements(self, description: int, *forms: int) -> Iterator[int]:
        """The ranks of ``description`` that hold elements of each of ``forms``."""
        table = self._descriptions[description].table
        for view in self._views:
            if view.description == description:
                layouts = [table[form].layout(view.grids, view.ranks) for form in forms]
                yield from (rank for rank in view.ranks if all(layout.boxes(rank) for layout in layouts))

    def _file_metadata(self) -> Mapping[str, str]:
        first, *others = self._descriptions
        for number, other in enumerate(others, 1):
            for key in first.file_metadata.keys() | other.file_metadata.keys():
                if first.file_metadata.get(key) != other.file_metadata.get(key):
                    raise UnsupportedTensorError(
                        f"cannot save {key!r}: the same quantised tensor on all ranks was expected, {self._words(self._ranks_of(number))} "
                        f"and {self._words(self._ranks_of(0))} differ; nothing was written"
                    )
        return first.file_metadata


_KIND_WORDS = {"f": "a frozen parameter", "t": "a trainable parameter", "b": "a buffer", "x": "a tensor"}


def _natural(name: str) -> tuple[list[Any], str]:
    """A key by which ``layers.2`` comes before ``layers.10``."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split("([0-9]+)", name))], name
