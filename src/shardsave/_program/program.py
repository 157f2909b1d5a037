"""The stored form of a program, and the module that runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from shardsave._common.strict_json import NotJSON, glimpse, parse_object
from shardsave._printable import printable
from shardsave._program.graph import GraphReader
from shardsave._program.refusals import BadProgram
from shardsave._program.signature import Signature
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError

FORMAT = "shardsave-program"


class Place(NamedTuple):
    """A tensor of a program. ``name``: in the program. ``tensor``: its name in the checkpoint, among the extra tensors if ``kept``."""

    name: str
    tensor: str
    kept: bool
    kind: str
    requires_grad: bool


_KINDS = ("parameter", "buffer", "constant")
_PLACE_TYPES = {"name": str, "tensor": str, "kept": bool, "kind": str, "requires_grad": bool}

#: How many parts the dotted name of a tensor may have.
_MAX_PARTS = 100


class ProgramDocument:
    """A stored program that has been checked and can run on ``device``. ``places``: its tensors, which are the first inputs of its graph.

    Raises CorruptCheckpointError, and IncompatibleCheckpointError for a program that needs a newer reader.
    """

    def __init__(self, data: bytes, where: str, device: torch.device) -> None:
        self.where = where
        try:
            content = parse_object(data)
        except NotJSON as error:
            self._refuse(error.wanted, error.found)
        if content.get("format") != FORMAT:
            self._refuse(f"a document of format {FORMAT} expected", f"it is {glimpse(content.get('format'))}")
        if content.get("requires") != [] or content.get("version") != 1:
            raise IncompatibleCheckpointError(
                f"cannot load {where}: it is of version {glimpse(content.get('version'))} and requires "
                f"{glimpse(content.get('requires'))}, which this version of shardsave does not know; "
                f"the checkpoint is intact, load it with a newer version"
            )
        origin = f"; it was saved with torch {content['torch']}" if isinstance(content.get("torch"), str) else ""
        self.training = content.get("training")
        if not (self.training is None or isinstance(self.training, bool)):
            self._refuse("training expected to be true, false or null", f"it is {glimpse(self.training)}")
        self.places = self._read_places(content.get("tensors"))
        try:
            self.signature = Signature(content.get("arguments"))
            self.graph = GraphReader(content.get("graphs"), device).graph(0)
            self.mutations = self._read_mutations(content.get("mutations"))
            inputs = len(self.places) + self.signature.inputs
            if self.graph.inputs != inputs:
                raise BadProgram("graphs[0]", f"{inputs} inputs, for its tensors and arguments,", self.graph.inputs)
        except BadProgram as error:
            self._refuse(f"{error.where}: {error.wanted} expected", f"it is {error.found}{origin}")
        except RecursionError:
            self._refuse("values that are nested less deeply expected", "they are nested too deeply")

    def _refuse(self, wanted: str, found: str) -> NoReturn:
        raise CorruptCheckpointError(f"corrupt {self.where}: {wanted}, {found}; nothing was run")

    def _read_places(self, documents: Any) -> list[Place]:
        places: dict[str, Place] = {}
        for document in documents if isinstance(documents, list) else [documents]:
            types = {key: type(value) for key, value in document.items()} if isinstance(document, dict) else {}
            name = document["name"] if types == _PLACE_TYPES else ""
            if not name or document["kind"] not in _KINDS or name in places or not _is_path(name):
                self._refuse(f"tensors expected, once each, with {', '.join(_PLACE_TYPES)}", f"one is {glimpse(document)}")
            places[name] = Place(**document)
        return list(places.values())

    def _read_mutations(self, numbers: Any) -> list[int]:
        """The inputs of the graph that are overwritten after a run, in the order in which the graph returns their new values."""
        result = self.graph.result
        count = len(result[0]) if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], list) else -1
        if (
            not isinstance(numbers, list)
            or len(numbers) != count
            or not all(type(number) is int and 0 <= number < self.graph.inputs for number in numbers)
        ):
            raise BadProgram("mutations", "numbers of inputs, as many as the graph returns values for,", numbers)
        return numbers


class LoadedProgram(nn.Module):
    """Runs a program. Its tensors are its parameters and buffers, under the names that they had in the model.

    Takes the arguments that the program was exported with, by position or by name. Raises TypeError and ValueError for
    other arguments.
    """

    def __init__(self, document: ProgramDocument, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._document = document
        self._tensors: list[tuple[nn.Module, str]] = []
        modules: dict[str, nn.Module] = {"": self}
        # Tied parameters are one object, so they stay tied when they are moved.
        parameters: dict[tuple[str, bool], nn.Parameter] = {}
        for place in document.places:
            path, _, attribute = place.name.rpartition(".")
            owner = _module_at(modules, path)
            if owner is None or _is_taken(owner, attribute):
                raise CorruptCheckpointError(
                    f"corrupt {document.where}: names that tensors of a module can have expected, one is {glimpse(place.name)}; "
                    f"nothing was run"
                )
            tensor = tensors[place.name]
            if place.kind == "parameter":
                requires_grad = place.requires_grad and (tensor.is_floating_point() or tensor.is_complex())
                parameter = nn.Parameter(tensor, requires_grad=requires_grad)
                owner.register_parameter(attribute, parameters.setdefault((place.tensor, place.kept), parameter))
            else:
                owner.register_buffer(attribute, tensor, persistent=place.kind == "buffer")
            self._tensors.append((owner, attribute))
        if document.training is not None:
            super().train(document.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = [getattr(owner, attribute) for owner, attribute in self._tensors]
        inputs += self._document.signature.bind(args, kwargs)
        new_values, result = self._document.graph(*inputs)
        for number, value in zip(self._document.mutations, new_values):
            inputs[number].copy_(value)
        return result

    def train(self, mode: bool = True) -> LoadedProgram:
        """Raises RuntimeError for a mode other than that of the export, since the program computes in that mode only."""
        exported = self._document.training
        if exported is not None and mode != exported:
            export_mode, mode_wanted = ("training", "evaluation") if exported else ("evaluation", "training")
            raise RuntimeError(
                f"the program was exported in {export_mode} mode and computes only that, {mode_wanted} mode was asked for; "
                f"export the model in {mode_wanted} mode"
            )
        return super().train(mode)

    def __repr__(self) -> str:
        return "\n".join(_outline(self, "LoadedProgram"))


def _outline(module: nn.Module, title: str, indent: str = "") -> Iterator[str]:
    """The lines with which torch prints a module; names are escaped, because they come from the file."""
    children = module._modules.items()
    yield f"{indent}{title}({'' if children else ')'}"
    for name, child in children:
        if type(child) is nn.Module:
            yield from _outline(child, f"({printable(name)}): Module", f"{indent}  ")
        else:
            yield f"{indent}  ({printable(name)}): " + repr(child).replace("\n", f"\n{indent}  ")
    if children:
        yield f"{indent})"


def _is_path(name: str) -> bool:
    parts = name.split(".", _MAX_PARTS)
    return len(parts) <= _MAX_PARTS and "" not in parts


def _module_at(modules: dict[str, nn.Module], path: str) -> nn.Module | None:
    """The module at ``path``, which is created if it does not exist; None if a module cannot have such a child."""
    module = modules[""]
    for end in [place for place, letter in enumerate(path) if letter == "."] + [len(path)] * bool(path):
        name = path[path.rfind(".", 0, end) + 1 : end]
        if path[:end] not in modules:
            if _is_taken(module, name):
                return None
            modules[path[:end]] = nn.Module()
            module.add_module(name, modules[path[:end]])
        module = modules[path[:end]]
    return module


def _is_taken(owner: nn.Module, name: str) -> bool:
    return hasattr(type(owner), name) or any(
        name in names for names in (vars(owner), owner._modules, owner._parameters, owner._buffers)
    )
