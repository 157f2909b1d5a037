"""What a document may use without trust, each function by name: they compute, and call none of their arguments.

Each was read. Left out of ``torch.nn.functional`` are functions that call an argument (``triplet_margin_with_distance_loss``,
``boolean_dispatch``, ``handle_torch_function``), raw kernels (``grouped_mm``, ``scaled_mm``) and what no module stores.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import torch
from torch import nn

from shardsave._architecture.class_checks import module_of

#: Types that a document may name as values, such as the factory of a defaultdict.
BUILTIN_TYPES = frozenset(["bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple"])

_FUNCTIONS: Mapping[str, str] = {
    "math": """
        acos acosh asin asinh atan atan2 atanh cbrt ceil comb copysign cos cosh degrees dist erf erfc exp exp2 expm1 fabs factorial floor
        fmod frexp fsum gamma gcd hypot isclose isfinite isinf isnan isqrt lcm ldexp lgamma log log10 log1p log2 modf nextafter perm pow
        prod radians remainder sin sinh sqrt tan tanh trunc ulp""",
    "torch": """
        abs add bmm cat celu clamp cos div erf exp hardshrink log log1p log_softmax matmul maximum minimum mul neg relu rsqrt selu sigmoid
        sin softmax sqrt square stack sub sum tanh where""",
    "torch.nn.functional": """
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
        adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices affine_grid alpha_dropout
        avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear binary_cross_entropy binary_cross_entropy_with_logits celu celu_
        channel_shuffle conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d cosine_embedding_loss
        cosine_similarity cross_entropy ctc_loss dropout dropout1d dropout2d dropout3d elu elu_ embedding embedding_bag
        feature_alpha_dropout fold fractional_max_pool2d fractional_max_pool3d fractional_max_pool2d_with_indices
        fractional_max_pool3d_with_indices gaussian_nll_loss gelu glu grid_sample group_norm gumbel_softmax hardshrink hardsigmoid
        hardswish hardtanh hardtanh_ hinge_embedding_loss huber_loss instance_norm interpolate kl_div l1_loss layer_norm leaky_relu
        leaky_relu_ linear local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d lp_pool3d margin_ranking_loss max_pool1d
        max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices max_unpool1d max_unpool2d
        max_unpool3d mish mse_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss native_channel_shuffle nll_loss
        normalize one_hot pad pairwise_distance pdist pixel_shuffle pixel_unshuffle poisson_nll_loss prelu relu relu6 relu_ rms_norm
        rrelu rrelu_ scaled_dot_product_attention selu selu_ sigmoid silu smooth_l1_loss soft_margin_loss softmax softmin softplus
        softshrink softsign tanh tanhshrink _threshold threshold_ triplet_margin_loss unfold upsample upsample_bilinear
        upsample_nearest""",
    "torch.nn.init": """
        calculate_gain constant_ dirac_ eye_ kaiming_normal_ kaiming_uniform_ normal_ ones_ orthogonal_ sparse_ trunc_normal_ uniform_
        xavier_normal_ xavier_uniform_ zeros_""",
    "torch.functional": "einsum",
}

#: The names of functions, and of types, that a document may use as values without trust.
VALUES = frozenset(
    [f"{module}:{name}" for module, names in _FUNCTIONS.items() for name in names.split()]
    + [f"builtins:{name}" for name in BUILTIN_TYPES]
)

#: The modules of torch.nn whose plain classes only compute. (Those of other modules import, compile or register.)
_UTILITIES = frozenset(
    f"torch.nn.utils.{name}" for name in ("weight_norm", "spectral_norm", "prune", "parametrize", "parametrizations", "rnn")
)


def in_torch_nn(name: str) -> bool:
    """Whether ``name`` is in ``torch.nn`` or a module below it that is public; private ones are not even imported."""
    module = name.partition(":")[0]
    return module == "torch.nn" or (module.startswith("torch.nn.") and "._" not in module)


def is_utility(kind: type) -> bool:
    """Whether ``kind`` is one of the hooks and parametrizations of ``torch.nn.utils`` that compute a weight."""
    return module_of(kind) in _UTILITIES


def only_computes(kind: type) -> bool:
    """For classes of ``torch.nn``: whether this is a module, an enum, a named tuple, or a hook that computes a weight."""
    return issubclass(kind, (nn.Module, torch.Tensor, enum.Enum, tuple)) or is_utility(kind)
