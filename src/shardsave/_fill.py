"""Fitting a checkpoint into a live module: what goes where, and what cannot, before a single tensor is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardsave._checkpoint import Located
from shardsave._dtypes import BY_NAME, torch_shape
from shardsave._state import plain_name, unwrap
from shardsave.errors import IncompatibleCheckpointError, UnsupportedTensorError


class _Slot(NamedTuple):
    """One name of the module: the sub-module that owns it, its attribute there, and the tensor."""

    name: str
    owner: nn.Module
    attribute: str
    tensor: torch.Tensor
    is_buffer: bool


@dataclass(frozen=True)
class Group:
    """Tensors that are read together: (name on disk, destination). `finish` is called once they are filled."""

    targets: tuple[tuple[str, torch.Tensor], ...]
    owner: nn.Module | None = None
    owner_name: str = ""
    own_names: Mapping[str, str] = field(default_factory=dict)  # name on disk → name inside the owner

    def finish(self) -> None:
        """Gives a sub-module with a loading routine of its own what was read for it."""
        if self.owner is None:
            return
        state = {self.own_names[name]: tensor for name, tensor in self.targets}
        try:
            self.owner.load_state_dict(state, strict=True)
        except Exception as error:
            raise IncompatibleCheckpointError(
                f"cannot load {self.owner_name!r}: its own load_state_dict was expected to take what was saved, it raised "
                f"{type(error).__name__}: {error}; the module is partly loaded"
            ) from error


class Fit:
    """How a checkpoint goes into a module. Nothing has been changed until `materialise` is called."""

    def __init__(self, module: nn.Module, device: torch.device | None) -> None:
        self.missing: tuple[str, ...] = ()
        self.unexpected: tuple[str, ...] = ()
        self.mismatched: tuple[str, ...] = ()
        self._module = module
        self._device = device
        self._stored: Mapping[str, Located] = {}
        self._slots: list[_Slot] = []
        self._leaders: dict[str, str] = {}  # every name → the first name with the same memory
        self._direct: list[str] = []
        self._hooked: list[tuple[str, nn.Module, dict[str, str]]] = []
        self._done: list[torch.Tensor] = []

    @property
    def names(self) -> list[str]:
        """The names whose bytes are read."""
        return [*self._direct, *(name for _, _, own in self._hooked for name in own)]

    def materialise(self) -> None:
        """Puts real memory behind meta tensors, and moves to the device asked for what is elsewhere; ties are kept."""
        made: dict[int, torch.Tensor] = {}
        loaded = {self._leaders[name] for name in self.names if name in self._leaders}
        for slot in self._slots:
            tensor = slot.tensor
            target = self._device or (torch.device("cpu") if tensor.is_meta else tensor.device)
            if not tensor.is_meta and (self._device is None or _same_device(tensor.device, target)):
                continue
            if tensor.is_meta and self._leaders[slot.name] not in loaded:
                continue  # not in the checkpoint of a load that is not strict
            if tensor.is_meta or slot.is_buffer:
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device=target) if tensor.is_meta else tensor.to(target)
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = empty
                holder: dict[str, Any] = slot.owner._buffers if slot.is_buffer else slot.owner._parameters
                holder[slot.attribute] = made[id(tensor)]
            elif id(tensor) not in made:
                made[id(tensor)] = tensor
                tensor.data = (
                    torch.empty_like(tensor.data, device=target)
                    if self._leaders[slot.name] in loaded
                    else tensor.data.to(target)
                )

    def groups(self) -> Iterator[Group]:
        """What is to be read: first all that goes straight into place, then one sub-module after the other."""
        current = {slot.name: slot.tensor for slot in _slots(self._module)}
        direct = tuple((name, current[name].detach()) for name in self._direct)
        self._done = [tensor for _, tensor in direct]
        yield Group(direct)
        for owner_name, owner, own in self._hooked:
            targets = []
            for name in own:
                t = self._stored[name]
                targets.append((name, torch.empty(torch_shape(t.dtype, t.shape), dtype=BY_NAME[t.dtype].torch)))
            yield Group(tuple(targets), owner, owner_name, own)

    def written(self) -> None:
        """Tells autograd that tensors were overwritten behind its back, so that a stale backward raises."""
        for tensor in self._done:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        self._done = []

    def restore_flags(self, flags: Mapping[str, bool] | None) -> int | None:
        """Sets ``requires_grad`` of floating-point parameters to what was saved; how many are frozen now, None if unknown.

        Where names that were saved apart with different flags are tied here, one trainable name makes the parameter trainable.
        """
        if flags is None:
            return None
        wanted: dict[int, tuple[nn.Parameter, bool]] = {}
        for name, parameter in self._module.named_parameters(remove_duplicate=False):
            frozen = flags.get(plain_name(name))
            if frozen is not None and (parameter.is_floating_point() or parameter.is_complex()):
                before = wanted.get(id(parameter), (parameter, True))[1]
                wanted[id(parameter)] = (parameter, frozen and before)
        for parameter, frozen in wanted.values():
            if parameter.requires_grad == frozen:
                parameter.requires_grad_(not frozen)
        return sum(frozen for _, frozen in wanted.values())


def fit_module(
    module: nn.Module,
    stored: Mapping[str, Located],
    *,
    device: torch.device | None,
    strict: bool,
    equal: Callable[[Located, Located], bool],
    where: str,
) -> Fit:
    """Finds out what of ``stored`` (name → stored tensor, tied names too) goes where in ``module``; changes nothing.

    ``equal`` tells whether two stored tensors hold the same bytes. Raises IncompatibleCheckpointError and
    UnsupportedTensorError with the module unchanged.
    """
    module = unwrap(module)
    fit = Fit(module, device)
    fit._stored = stored
    slots = _slots(module)
    expected = _expected_names(module)
    fit._slots = slots
    hooked = _hooked_modules(module)
    hooked_prefixes = tuple(f"{name}." if name else "" for name, _ in hooked)
    inside = {name for name in expected if any(name.startswith(prefix) for prefix in hooked_prefixes)}
    slot_of = {slot.name: slot for slot in slots}
    fit.unexpected = tuple(sorted(stored.keys() - expected))
    _note_ties(fit, slots)
    filled = {fit._leaders[name] for name in stored if name in fit._leaders}
    fit.missing = tuple(
        sorted(
            name
            for name in expected - stored.keys()
            if not name.endswith("num_batches_tracked") and fit._leaders.get(name) not in filled
        )
    )
    mismatched = []
    for name in sorted(expected & stored.keys() - inside):
        t, tensor = stored[name], slot_of[name].tensor
        shape = torch_shape(t.dtype, t.shape)
        if shape != tuple(tensor.shape) and not (tensor.dim() == 0 and shape == (1,)):
            mismatched.append(f"{name} {list(shape)} on disk, {list(tensor.shape)} in the module")
    fit.mismatched = tuple(mismatched)
    if strict and (fit.missing or fit.unexpected or fit.mismatched):
        _refuse_difference(fit, module, where)
    shapes_differ = {entry.split(" ")[0] for entry in mismatched}
    usable = [slot for slot in slots if slot.name in stored and slot.name in expected and slot.name not in inside]
    usable = [slot for slot in usable if slot.name not in shapes_differ]
    leaders: dict[str, str] = {}
    for slot in usable:
        _check_fillable(slot, where)
        leader = leaders.setdefault(fit._leaders[slot.name], slot.name)
        if leader != slot.name and stored[leader] is not stored[slot.name] and not equal(stored[leader], stored[slot.name]):
            raise IncompatibleCheckpointError(
                f"cannot load {where}: {leader!r} and {slot.name!r} are one tensor in the module and were expected to be equal on "
                f"disk, they differ; the module is unchanged"
            )
    fit._direct = list(leaders.values())
    for (name, owner), prefix in zip(hooked, hooked_prefixes):
        own = {full: full[len(prefix) :] for full in stored if full in inside and full.startswith(prefix)}
        if own:
            fit._hooked.append((name, owner, own))
    _refuse_meta_left_over(slots, expected, where)
    return fit


def _slots(module: nn.Module) -> list[_Slot]:
    """Every parameter and buffer by every name it has, in module order."""
    made = []
    for prefix, owner in module.named_modules(remove_duplicate=False):
        start = plain_name(f"{prefix}." if prefix else "")
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                made.append(_Slot(start + attribute, owner, attribute, parameter, False))
        for attribute, buffer in owner._buffers.items():
            if buffer is not None:
                made.append(_Slot(start + attribute, owner, attribute, buffer, True))
    return made


def _expected_names(module: nn.Module) -> set[str]:
    """The names that the module's own state dict has."""
    names: set[str] = set()
    for prefix, owner in module.named_modules(remove_duplicate=False):
        start = plain_name(f"{prefix}." if prefix else "")
        names.update(start + name for name, value in owner._parameters.items() if value is not None)
        hidden = owner._non_persistent_buffers_set
        names.update(start + name for name, value in owner._buffers.items() if value is not None and name not in hidden)
        if type(owner).get_extra_state is not nn.Module.get_extra_state:
            names.add(start + "_extra_state")
    return names


def _hooked_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost sub-modules that have a say in how they are loaded, and so are loaded by their own routine."""
    found: list[tuple[str, nn.Module]] = []
    for raw_name, owner in module.named_modules():
        name = plain_name(raw_name)
        if any(name == outer or name.startswith(f"{outer}.") or not outer for outer, _ in found):
            continue
        if _has_own_loading(owner):
            found.append((name, owner))
    return found


def _has_own_loading(module: nn.Module) -> bool:
    kind = type(module)
    overridden = kind._load_from_state_dict is not nn.Module._load_from_state_dict and not _only_versions(kind)
    return bool(
        overridden
        or kind.load_state_dict is not nn.Module.load_state_dict
        or kind.set_extra_state is not nn.Module.set_extra_state
        or module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
    )


def _only_versions(kind: type[nn.Module]) -> bool:
    """torch's batch norms override loading only to accept state from before ``num_batches_tracked`` existed."""
    defining = next(base for base in kind.__mro__ if "_load_from_state_dict" in base.__dict__)
    return defining.__module__ == "torch.nn.modules.batchnorm"


def _note_ties(fit: Fit, slots: list[_Slot]) -> None:
    first: dict[object, str] = {}
    for slot in slots:
        tensor = slot.tensor
        key: object = id(tensor)
        if not tensor.is_meta and not is_lazy(tensor) and type(tensor) in (torch.Tensor, nn.Parameter) and tensor.data_ptr():
            key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        fit._leaders[slot.name] = first.setdefault(key, slot.name)


def _check_fillable(slot: _Slot, where: str) -> None:
    tensor = slot.tensor
    if is_lazy(tensor):
        _refuse(slot, where, "a parameter with a shape was expected", "it is lazy; run a forward pass first")
    if hasattr(tensor, "__tensor_flatten__") or type(tensor) not in (
        torch.Tensor,
        nn.Parameter,
        getattr(nn, "Buffer", nn.Parameter),
    ):
        _refuse(slot, where, "a plain tensor was expected", f"it is a {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        _refuse(slot, where, "a strided tensor was expected", f"its layout is {tensor.layout}")
    if tensor.is_meta:
        return
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride())):
        _refuse(
            slot, where, "memory of its own for each element was expected", "it is expanded; call .contiguous() on it first"
        )


def _refuse(slot: _Slot, where: str, wanted: str, found: str) -> NoReturn:
    raise UnsupportedTensorError(f"cannot fill {slot.name!r} from {where}: {wanted}, {found}; the module is unchanged")


def _refuse_meta_left_over(slots: list[_Slot], expected: set[str], where: str) -> None:
    left = [slot.name for slot in slots if slot.is_buffer and slot.tensor.is_meta and slot.name not in expected]
    if left:
        raise IncompatibleCheckpointError(
            f"cannot load {where}: buffers with data were expected, these are not saved and on the meta device: {_listed(left)}; "
            f"give them values first; the module is unchanged"
        )


def _refuse_difference(fit: Fit, module: nn.Module, where: str) -> NoReturn:
    parts = [
        f"{word} {len(names)}: {_listed(names)}"
        for word, names in (("missing", fit.missing), ("unexpected", fit.unexpected), ("mismatched", fit.mismatched))
        if names
    ]
    hint = ""
    if fit.missing and fit.unexpected and any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__):
        hint = "; for some transformers models the names that save_pretrained writes differ from those in memory: use from_pretrained"
    raise IncompatibleCheckpointError(
        f"cannot load {where}: the module's names and shapes were expected, found {'; '.join(parts)}{hint}; the module is unchanged"
    )


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names)


def _same_device(left: torch.device, right: torch.device) -> bool:
    if left.type != right.type:
        return False
    if right.index is None and left.type == "cuda":
        return left.index == torch.cuda.current_device()
    return left.index == right.index or right.index is None
