"""What the optimizers of torch, torchao and transformers hold for a parameter: something else would fail only in a later step.

Of other classes nothing is known, and all is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from shardsave._training.kinds import inner
from shardsave._training.value_kinds import NUMBER, kind_in_words, value_in_words

Shape = Sequence[int]

#: The options of a group, and the shape of a parameter in it → whether a value is needed.
_When = Callable[[Mapping[str, Any], Shape], bool]


class _Kind(NamedTuple):
    """``words``: what is expected for a parameter of a shape. ``fits``: whether a value is that, for a parameter of a shape."""

    words: Callable[[Shape], str]
    fits: Callable[[Any, torch.Tensor, Shape], bool]


def _tensor(shape_of: Callable[[Shape], Shape]) -> _Kind:
    def fits(value: Any, parameter: torch.Tensor, shape: Shape) -> bool:
        if not isinstance(value, torch.Tensor) or value.shape != shape_of(shape):
            return False
        return value.is_floating_point() or (value.is_complex() and parameter.is_complex())

    return _Kind(lambda shape: f"a tensor of {[*shape_of(shape)]} of floating numbers", fits)


def _list(kind: _Kind) -> _Kind:
    def fits(value: Any, parameter: torch.Tensor, shape: Shape) -> bool:
        return isinstance(value, list) and all(item is None or kind.fits(item, parameter, shape) for item in value)

    return _Kind(lambda shape: f"a list, each {kind.words(shape)}", fits)


_LIKE = _tensor(lambda shape: shape)
_NUMBER = _Kind(lambda shape: NUMBER, lambda value, parameter, shape: kind_in_words(value) == NUMBER)


def _always(group: Mapping[str, Any], shape: Shape) -> bool:
    return True


def _never(group: Mapping[str, Any], shape: Shape) -> bool:
    return False


def _is_matrix(group: Mapping[str, Any], shape: Shape) -> bool:
    return len(shape) > 1


def _is_vector(group: Mapping[str, Any], shape: Shape) -> bool:
    return len(shape) < 2


def _with(option: str) -> _When:
    """Whether the group has ``option``: a flag, or a number that is not 0. A tensor has not been read yet."""
    return lambda group, shape: isinstance(group.get(option), (bool, int, float)) and bool(group[option])


_Form = Mapping[str, tuple[_Kind, _When]]

_STEP: _Form = {"step": (_NUMBER, _always)}
_ADAM: _Form = {
    **_STEP,
    "exp_avg": (_LIKE, _always),
    "exp_avg_sq": (_LIKE, _always),
    "max_exp_avg_sq": (_LIKE, _with("amsgrad")),
}
_MOMENTUM: _Form = {"momentum_buffer": (_LIKE, _never)}

#: The full name of a class (of torch's without the file) → each value of the state of a parameter, what it is, and whether a step needs it.
_FORMS: Mapping[str, _Form] = {
    "torch.optim.Adadelta": {**_STEP, "square_avg": (_LIKE, _always), "acc_delta": (_LIKE, _always)},
    "torch.optim.Adafactor": {
        **_STEP,
        "row_var": (_tensor(lambda shape: (*shape[:-1], 1)), _is_matrix),
        "col_var": (_tensor(lambda shape: (*shape[:-2], 1, *shape[-1:])), _is_matrix),
        "variance": (_LIKE, _is_vector),
    },
    "torch.optim.Adagrad": {**_STEP, "sum": (_LIKE, _always)},
    "torch.optim.Adam": _ADAM,
    "torch.optim.Adamax": {**_STEP, "exp_avg": (_LIKE, _always), "exp_inf": (_LIKE, _always)},
    "torch.optim.ASGD": {**_STEP, "eta": (_NUMBER, _always), "mu": (_NUMBER, _always), "ax": (_LIKE, _always)},
    "torch.optim.NAdam": {**_ADAM, "mu_product": (_NUMBER, _always)},
    "torch.optim.RAdam": _ADAM,
    "torch.optim.RMSprop": {
        **_STEP,
        "square_avg": (_LIKE, _always),
        "momentum_buffer": (_LIKE, _with("momentum")),
        "grad_avg": (_LIKE, _with("centered")),
    },
    "torch.optim.Rprop": {**_STEP, "prev": (_LIKE, _always), "step_size": (_LIKE, _always)},
    "torch.optim.SGD": _MOMENTUM,
    "torch.optim.SparseAdam": _ADAM,
    "torch.optim.Muon": _MOMENTUM,
    "torchao.optim.adam._AdamBase": _ADAM,
    "transformers.optimization.Adafactor": {
        **_STEP,
        "exp_avg": (_LIKE, _with("beta1")),
        "exp_avg_sq_row": (_tensor(lambda shape: shape[:-1]), _is_matrix),
        "exp_avg_sq_col": (_tensor(lambda shape: (*shape[:-2], *shape[-1:])), _is_matrix),
        "exp_avg_sq": (_LIKE, _is_vector),
        "RMS": (_NUMBER, _never),
    },
}

#: Of LBFGS, which holds one vector of all parameters, with the first of them.
_LBFGS: _Form = {
    **dict.fromkeys(("func_evals", "n_iter"), (_NUMBER, _always)),
    **dict.fromkeys(("t", "H_diag", "prev_loss"), (_NUMBER, _never)),
    **dict.fromkeys(("d", "prev_flat_grad"), (_LIKE, _never)),
    **dict.fromkeys(("old_dirs", "old_stps"), (_list(_LIKE), _never)),
    **dict.fromkeys(("ro", "al"), (_list(_NUMBER), _never)),
}


def wrong_state(
    optimizer: Any, groups: Iterable[tuple[Mapping[str, Any], Sequence[str]]], state: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """The first value that no step of ``optimizer`` could use, in words; None if there is none.

    ``groups``: for each of its groups the options that it will have, and the names of its parameters. ``state``: by such a name.
    """
    optimizer = inner(optimizer)
    form = _form_of(type(optimizer))
    if form is None:
        return None
    for own, (group, names) in zip(optimizer.param_groups, groups):
        for parameter, name in zip(own["params"], names):
            if not (values := state.get(name)):
                continue
            shape: Shape = parameter.shape if form is not _LBFGS else (_numbers_in(optimizer),)
            for key, (kind, is_needed) in form.items():
                value = values.get(key)
                if value is None:
                    if is_needed(group, shape):
                        return f"{key!r} of {name!r} was expected to be {kind.words(shape)}, the checkpoint has none"
                elif not kind.fits(value, parameter, shape):
                    return f"{key!r} of {name!r} was expected to be {kind.words(shape)}, the checkpoint has {value_in_words(value)}"
    return None


def _form_of(kind: type) -> _Form | None:
    """What is known of ``kind``: what is known of the class whose step it makes."""
    for base in kind.__mro__:
        module = "torch.optim" if base.__module__.startswith("torch.optim.") else base.__module__
        name = f"{module}.{base.__qualname__}"
        form = _LBFGS if name == "torch.optim.LBFGS" else _FORMS.get(name)
        if form is not None:
            return form if inspect.unwrap(kind.step) is inspect.unwrap(base.step) else None  # type: ignore[attr-defined]
    return None


def _numbers_in(optimizer: torch.optim.Optimizer) -> int:
    """How many real numbers all parameters have."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return sum(parameter.numel() * (2 if parameter.is_complex() else 1) for parameter in parameters)
