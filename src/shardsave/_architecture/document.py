"""The architecture document: the names that its writer and its reader share, and the check of its top level.

The document is one JSON object. ``objects`` is a table of everything that has an identity (modules, tensors, lists, dicts, other
instances), so shared objects stay shared and cycles are possible; the first object is the module itself. A value is a JSON scalar,
``{"ref": number in the table}``, or an object with one tag (``{"tuple": […]}``, ``{"dtype": "float32"}``).
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from shardsave._common.strict_json import NotJSON, glimpse, parse_object
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError

FORMAT = "shardsave-architecture"

#: The features that this reader supports; a document lists those that it needs in ``requires``. There are none yet.
SUPPORTED_FEATURES: frozenset[str] = frozenset()

#: Dict types other than ``dict``, by their names in the document.
DICT_TYPES: Mapping[str, type] = {
    "OrderedDict": collections.OrderedDict,
    "defaultdict": collections.defaultdict,
    "Counter": collections.Counter,
}

#: Attributes that torch itself sets on every module; all other attributes are set by the module's own code.
TORCH_ATTRIBUTES = frozenset(nn.Module().__dict__) - {"training"}

#: Groups whose hooks are saved if they are methods of the module, or objects of torch.nn.utils that compute a weight.
HOOK_GROUPS = ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


class Document:
    """A document with a checked top level: ``imports`` (name → saved version) and ``objects``, the table.

    Raises CorruptCheckpointError, and IncompatibleCheckpointError for a document that needs a newer reader.
    """

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        try:
            content = parse_object(data)
        except NotJSON as error:
            self.refuse(error.wanted, error.found)
        requires = content.get("requires")
        if content.get("format") != FORMAT or not isinstance(requires, list):
            self.refuse(f"a document of format {FORMAT} expected", f"it is {glimpse(content.get('format'))}")
        if unknown := [feature for feature in requires if feature not in SUPPORTED_FEATURES]:
            raise IncompatibleCheckpointError(
                f"cannot build {where}: it requires {glimpse(unknown)}, which this version of shardsave does not know; "
                f"the checkpoint is intact, build it with a newer version"
            )
        self.imports: dict[str, str | None] = content.get("imports")  # type: ignore[assignment]
        self.objects: list[dict[str, Any]] = content.get("objects")  # type: ignore[assignment]
        if not isinstance(self.imports, dict) or not all(v is None or isinstance(v, str) for v in self.imports.values()):
            self.refuse("imports expected to map names to versions", f"they are {glimpse(self.imports)}")
        if not isinstance(self.objects, list) or not self.objects or not all(type(node) is dict for node in self.objects):
            self.refuse("objects expected to be a list of objects", f"they are {glimpse(self.objects)}")

    def refuse(self, wanted: str, found: str) -> NoReturn:
        raise CorruptCheckpointError(f"corrupt {self.where}: {wanted}, {found}; nothing was built")
