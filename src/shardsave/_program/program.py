"""A program as it is stored, and the module that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from shardsave._common.strict_json import NotJSON, glimpse, parse_object
from shardsave._program.graph import Bad, Reader
from shardsave._program.signature import Signature
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError

FORMAT = "shardsave-program"


class Place(NamedTuple):
    """A tensor of a program: its name in the program, and where the checkpoint has it (``kept``: among the extra tensors)."""

    name: str
    tensor: str
    kept: bool
    kind: str
    requires_grad: bool


_KINDS = ("parameter", "buffer", "constant")
_PLACE = {"name": str, "tensor": str, "kept": bool, "kind": str, "requires_grad": bool}

#: How many modules a name leads through at most.
_MAX_PARTS = 100


class ProgramDocument:
    """A program as it is stored, checked, to be run on ``device``. ``places``: the tensors that it needs, the graph's first inputs.

    Raises CorruptCheckpointError, IncompatibleCheckpointError.
    """

    def __init__(self, data: bytes, where: str, device: torch.device) -> None:
        self.where = where
        try:
            top = parse_object(data)
        except NotJSON as refusal:
            self._bad(refusal.wanted, refusal.found)
        if top.get("format") != FORMAT:
            self._bad(f"a document of format {FORMAT} expected", f"it is {glimpse(top.get('format'))}")
        if top.get("requires") != [] or top.get("version") != 1:
            raise IncompatibleCheckpointError(
                f"cannot load {where}: it is of version {glimpse(top.get('version'))} and requires {glimpse(top.get('requires'))}, which "
                f"this version of shardsave does not know; the checkpoint is intact, load it with a newer version"
            )
        made_by = f"; it was saved with torch {top['torch']}" if isinstance(top.get("torch"), str) else ""
        self.training = top.get("training")
        if not (self.training is None or isinstance(self.training, bool)):
            self._bad("training expected to be true, false or null", f"it is {glimpse(self.training)}")
        self.places = self._places(top.get("tensors"))
        try:
            self.signature = Signature(top.get("arguments"))
            self.graph = Reader(top.get("graphs"), device).graph(0)
            self.mutations = self._mutations(top.get("mutations"))
            wanted = len(self.places) + self.signature.inputs
            if self.graph.inputs != wanted:
                raise Bad("graphs[0]", f"{wanted} inputs, for its tensors and arguments,", self.graph.inputs)
        except Bad as bad:
            self._bad(f"{bad.where}: {bad.wanted} expected", f"it is {bad.found}{made_by}")
        except RecursionError:
            self._bad("values that are nested less deeply expected", "they are deeper")

    def _bad(self, wanted: str, found: str) -> NoReturn:
        raise CorruptCheckpointError(f"corrupt {self.where}: {wanted}, {found}; nothing was run")

    def _places(self, listed: Any) -> list[Place]:
        places: dict[str, Place] = {}
        for place in listed if isinstance(listed, list) else [listed]:
            kinds = {key: type(value) for key, value in place.items()} if isinstance(place, dict) else {}
            name = place["name"] if kinds == _PLACE else ""
            if not name or place["kind"] not in _KINDS or name in places or not _is_path(name):
                self._bad("tensors expected, each once, with a name, a place and a kind", f"one is {glimpse(place)}")
            places[name] = Place(**place)
        return list(places.values())

    def _mutations(self, listed: Any) -> list[int]:
        """Inputs of the graph that are overwritten by the first results of it, one by one."""
        result = self.graph.result
        count = len(result[0]) if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], list) else -1
        if (
            not isinstance(listed, list)
            or len(listed) != count
            or not all(type(n) is int and 0 <= n < self.graph.inputs for n in listed)
        ):
            raise Bad("mutations", "numbers of inputs, as many as results for them,", listed)
        return listed


class LoadedProgram(nn.Module):
    """Runs a program. Its tensors are its parameters and buffers, under the names that they had in the model.

    Takes the arguments that the program was exported with, by place or by name; raises TypeError and ValueError for others.
    """

    def __init__(self, document: ProgramDocument, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._document = document
        self._tensors: list[tuple[nn.Module, str]] = []
        modules: dict[str, nn.Module] = {"": self}
        parameters: dict[tuple[str, bool], nn.Parameter] = {}  # what is tied is one object, and stays one when it is moved
        for place in document.places:
            path, _, attribute = place.name.rpartition(".")
            owner = _module_at(modules, path)
            if owner is None or _taken(owner, attribute):
                raise CorruptCheckpointError(
                    f"corrupt {document.where}: names that a module can give to tensors expected, one is {glimpse(place.name)}; "
                    f"nothing was run"
                )
            memory = (place.tensor, place.kept)
            if place.kind == "parameter":
                tensor = tensors[place.name]
                trained = place.requires_grad and (tensor.is_floating_point() or tensor.is_complex())
                owner.register_parameter(attribute, parameters.setdefault(memory, nn.Parameter(tensor, requires_grad=trained)))
            else:
                owner.register_buffer(attribute, tensors[place.name], persistent=place.kind == "buffer")
            self._tensors.append((owner, attribute))
        if document.training is not None:
            super().train(document.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [getattr(owner, attribute) for owner, attribute in self._tensors]
        given += self._document.signature.bind(args, kwargs)
        written, result = self._document.graph(*given)
        for place, value in zip(self._document.mutations, written):
            given[place].copy_(value)
        return result

    def train(self, mode: bool = True) -> LoadedProgram:
        """Raises RuntimeError for the other mode than that in which the program was exported: it would compute the same."""
        exported = self._document.training
        if exported is not None and mode != exported:
            was, asked = ("training", "evaluation") if exported else ("evaluation", "training")
            raise RuntimeError(
                f"the program was exported in {was} mode and computes as in that, {asked} mode was asked for; export it so"
            )
        return super().train(mode)


def _is_path(name: str) -> bool:
    parts = name.split(".", _MAX_PARTS)
    return len(parts) <= _MAX_PARTS and "" not in parts


def _module_at(modules: dict[str, nn.Module], path: str) -> nn.Module | None:
    """The module that has the tensors below ``path``, made where there is none; None where a module cannot have such a child."""
    here = modules[""]
    for end in [place for place, letter in enumerate(path) if letter == "."] + [len(path)] * bool(path):
        name = path[path.rfind(".", 0, end) + 1 : end]
        if path[:end] not in modules:
            if _taken(here, name):
                return None
            modules[path[:end]] = nn.Module()
            here.add_module(name, modules[path[:end]])
        here = modules[path[:end]]
    return here


def _taken(owner: nn.Module, name: str) -> bool:
    return hasattr(type(owner), name) or any(
        name in names for names in (vars(owner), owner._modules, owner._parameters, owner._buffers)
    )
