"""Which arguments and sub-configs a config class of transformers names, by its signature and its code. Nothing of a class is run."""

from __future__ import annotations

import dataclasses
import dis
import importlib
import inspect
import typing
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any

#: Arguments of the base class, of older releases, and of modules that read them without a declaration. They hold numbers and words.
_COMMON = frozenset({
    "model_type", "transformers_version", "dtype", "torch_dtype", "return_dict", "output_hidden_states", "output_attentions",
    "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "add_cross_attention", "cross_attention_hidden_size",
    "tie_word_embeddings", "tie_encoder_decoder", "use_cache", "tie_last_hidden_states", "id2label", "label2id", "num_labels",
    "problem_type", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "rope_theta",
    "rope_scaling", "rope_parameters", "partial_rotary_factor", "out_features", "out_indices", "per_layer_config", "head_dim",
    "hidden_size", "embedding_size", "layer_types", "sliding_window", "attention_chunk_size", "attention_head_size",
    "initializer_range", "embedding_initializer_range", "initializer_cutoff_factor", "position_embedding_type", "hidden_act",
    "hidden_dropout", "layerdrop", "is_causal", "classifier_dropout", "classifier_dropout_rate", "cls_dropout", "summary_type",
    "summary_use_proj", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "adapter_attn_dim",
    "apply_spec_augment", "relative_attention", "max_relative_positions", "position_buckets", "position_biased_input",
    "norm_rel_ebd", "share_att_key", "talking_head", "conv_kernel_size", "conv_groups", "conv_act", "conv_pos_batch_norm",
    "num_register_tokens", "return_class_token", "swiglu_limit", "swiglu_alpha", "mlp_up_softcap", "mlp_gate_softcap",
    "num_local_experts", "router_bias", "spatial_pool_out_channels", "encoder_cross_output_size", "use_bidirectional_attention",
    "freeze_batch_norm_2d", "pre_norm", "beta",
})  # fmt: skip

#: Arguments that no model needs for its modules: files and data sets of a retriever, settings of a third-party detector.
_UNUSED = frozenset({
    "detectron2_config_args", "dataset", "dataset_split", "dataset_revision", "index_name", "index_path", "passages_path",
    "use_dummy_dataset",
})  # fmt: skip

#: What runs a layer: a name may be that of a kernel, which is code from the Hub.
_IMPLEMENTATIONS = frozenset({"attn_implementation", "experts_implementation"})

#: Arguments that some classes read although no signature has them.
_UNDECLARED = {
    "timm_wrapper": ("num_classes", "label_names"),
    "gemma3n_vision": ("num_classes", "label_names"),
    "timm_backbone": ("img_size", "always_partition"),
}


@cache
def argument_names(config_class: Any) -> frozenset[str]:
    """The arguments that ``config_class`` names: in its signature, by an alias, or as an older name that its own code reads."""
    base = _base_class()
    names = set(signature(config_class))
    for each in config_class.__mro__:
        if issubclass(each, base) and each is not base:
            for routine in (each.__dict__.get("__post_init__"), each.__dict__.get("__init__")):
                code = getattr(inspect.unwrap(routine), "__code__", None) if routine is not None else None
                names |= set(_named_in(code)) if code is not None else set()
    # What is an attribute of the base class steers transformers itself; of that, only what was reviewed is taken.
    names = {name for name in names if not hasattr(base, name)} | _COMMON
    for pair in config_class.attribute_map.items():  # one of the two is declared; files have either
        names |= {name for name in pair if not hasattr(base, name)} if names.intersection(pair) else set()
    names |= set(_UNDECLARED.get(config_class.model_type, ()))
    return frozenset(name for name in names - _UNUSED - _IMPLEMENTATIONS if not _is_routine(config_class, name))


def _is_routine(config_class: Any, name: str) -> bool:
    """Whether an attribute ``name`` would hide code of the class."""
    attribute = inspect.getattr_static(config_class, name, None)
    return callable(attribute) or isinstance(attribute, (classmethod, staticmethod))


@cache
def signature(config_class: Any) -> frozenset[str]:
    """The arguments of the constructor, and the fields of a data class, whose constructor may take them as ``**kwargs``."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(config_class.__init__).parameters.items()
    names = {name for name, parameter in parameters if parameter.kind in kinds and name != "self"}
    fields = dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ()
    return frozenset(names | {field.name for field in fields if field.init})


def _named_in(code: CodeType) -> Iterator[str]:
    """The names in ``code`` that could be arguments: text constants, and the attributes that it sets."""
    for constant in code.co_consts:
        for part in constant if isinstance(constant, tuple) else (constant,):
            if isinstance(part, str) and part.isidentifier() and not part.startswith("_"):
                yield part
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_ATTR" and not instruction.argval.startswith("_"):
            yield instruction.argval


@cache
def sub_configs(config_class: Any) -> dict[str, Any]:
    """Argument → the class of the sub-config that it holds; or the type of model, if any of transformers' may stand there."""
    base = _base_class()
    configs: dict[str, Any] = {}
    for field in dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ():
        classes = [kind for kind in typing.get_args(field.type) if isinstance(kind, type) and issubclass(kind, base)]
        if classes:
            configs[field.name] = classes[0]
    configs |= getattr(config_class, "sub_configs", None) or {}
    defaults = getattr(config_class, "sub_configs_defaults", {})
    for name, inner in configs.items():
        if name == "backbone_config" or inner is base or not issubclass(inner, base):
            configs[name] = getattr(defaults.get(name), "model_type", None) or ""
    return configs


def _base_class() -> Any:
    return importlib.import_module("transformers.configuration_utils").PretrainedConfig
