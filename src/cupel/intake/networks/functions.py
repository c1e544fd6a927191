"""The closed list of functions that a network read from a file may call."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cupel.core.errors import CupelError

# Functions of torch.ops.aten that a program may call: pure tensor functions (and their in-place forms) that
# check their arguments. Left out on purpose: from_file and other doors to files, as_strided, set_ and resize_
# (memory that is not theirs), random draws, and everything with a `Storage`, `Stream` or `Generator`.
ATEN = frozenset(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool3d _log_softmax _safe_softmax
    _softmax _to_copy _unsafe_view abs acos acosh adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d add addbmm
    addcdiv addcmul addmm addmv alias all alpha_dropout amax amin aminmax any arange argmax argmin argsort asin
    asinh atan atan2 atanh avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bilinear bitwise_and bitwise_not
    bitwise_or bitwise_xor bmm broadcast_to broadcast_tensors bucketize cat cdist ceil celu chunk clamp clamp_max
    clamp_min clone col2im complex concat constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d convolution cos cosh cosine_similarity cross cummax cummin cumprod cumsum
    detach diag diag_embed diagonal diff div dot dropout einsum elu embedding empty_like eq erf erfc exp expand
    expand_as expm1 eye feature_dropout fft_fft fft_ifft fft_irfft fft_rfft fft_fft2 fft_ifft2 fft_irfft2 fft_rfft2
    fill flatten flip floor floor_divide fmod frac frobenius_norm full full_like gather ge gelu glu grid_sampler
    grid_sampler_2d group_norm gt hardshrink hardsigmoid hardswish hardtanh hstack im2col imag index
    index_add index_copy index_fill index_put index_select instance_norm isfinite isinf isnan kthvalue layer_norm
    le leaky_relu lerp lift_fresh_copy linalg_norm linalg_vector_norm linear linspace log log10 log1p log2
    log_sigmoid log_softmax logaddexp logical_and logical_not logical_or logical_xor logit logsumexp lt
    masked_fill masked_scatter matmul max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d
    max_pool3d_with_indices maximum mean median meshgrid min minimum mish mm movedim mse_loss mul multiply mv
    nan_to_num narrow native_layer_norm ne neg new_empty new_full new_ones
    new_zeros norm numpy_T one_hot ones ones_like outer pad permute pixel_shuffle pixel_unshuffle polar pow prelu
    prod real reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 remainder repeat
    repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape rms_norm roll
    rot90 round rsqrt rsub scalar_tensor scaled_dot_product_attention scatter
    scatter_add scatter_reduce select select_scatter selu sgn sigmoid sign silu sin sinh slice slice_scatter
    softmax softplus softshrink sort split split_with_sizes sqrt square squeeze stack std sub subtract sum
    swapaxes swapdims t take_along_dim tan tanh tensor_split threshold tile to topk transpose tril triu true_divide
    trunc unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze upsample_bicubic2d upsample_bilinear2d
    upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
    var var_mean view view_as view_as_complex view_as_real where zeros zeros_like
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    abs_ add_ addcmul_ clamp_ clamp_max_ clamp_min_ copy_ div_ elu_ exp_ fill_ hardsigmoid_ hardswish_
    hardtanh_ index_add_ index_copy_ index_fill_ index_put_ leaky_relu_ masked_fill_ mish_ mul_ neg_ relu_ relu6_
    scatter_ scatter_add_ selu_ sigmoid_ silu_ sqrt_ squeeze_ sub_ tanh_ threshold_ transpose_ t_ unsqueeze_ zero_
    """.split()  # noqa: SIM905
)
# Kernels that trust the sizes they are given: a program may call them only where a layer of torch takes their place.
LAYERS_ONLY = frozenset(("_native_batch_norm_legit_no_training", "native_group_norm", "native_dropout", "dropout_"))
# Arithmetic on sizes. Powers and shifts are left out: they make numbers of any length from short ones.
PLAIN: Mapping[str, Callable[..., Any]] = {
    **{f"_operator.{n}": getattr(operator, n) for n in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg")},
    **{f"_operator.{n}": getattr(operator, n) for n in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"_operator.{n}": getattr(operator, n) for n in ("and_", "or_", "not_", "getitem")},
    **{f"math.{n}": getattr(math, n) for n in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{n}": getattr(torch, n) for n in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite")},
    "torch.ops.aten.sym_size.int": lambda x, dim: x.size(dim),
    "torch.ops.aten.sym_numel.default": lambda x: x.numel(),
}


GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(op: str) -> Callable[..., Any]:
    """A recurrent function of torch after a check of every shape: torch's own kernels write past the end without it."""
    call: Callable[..., Any] = getattr(torch.ops.aten, op).input

    def checked(x: Any, hx: Any, params: Any, biases: bool, layers: int, *rest: Any) -> Any:
        if isinstance(x, Tensor):
            bidirectional, batch_first = rest[2], rest[3]
            states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
            sides, each, size = 2 if bidirectional else 1, 4 if biases else 2, states[0].shape[-1]
            rows = x.shape[0 if batch_first else 1] if x.ndim == 3 else -1
            good = all(tuple(s.shape) == (layers * sides, rows, size) for s in states)
            good &= len(states) == (2 if op == "lstm" else 1) and len(params) == layers * sides * each
            for n, weight in enumerate(params):
                wide = (x.shape[-1] if n < sides * each else size * sides, size)
                tail = wide[n % each : n % each + 1] if n % each < 2 else ()
                good &= tuple(weight.shape) == (GATES[op] * size, *tail)
            if not good or len({t.dtype for t in (x, *states, *params)}) != 1:
                raise ValueError(f"tensors of {op} must fit together; input {list(x.shape)}, {len(params)} parameters")
        return call(x, hx, params, biases, layers, *rest)

    return checked


def _packet(target: str) -> tuple[str, str]:
    """Name and overload of an aten operator that exists here; empty for anything else."""
    parts = target.split(".")
    if len(parts) == 5 and parts[:3] == ["torch", "ops", "aten"] and parts[3] in ATEN | LAYERS_ONLY | GATES.keys():
        packet = getattr(torch.ops.aten, parts[3], None)
        if packet is not None and parts[4] in packet.overloads():
            return parts[3], parts[4]
    return "", ""


def check_target(target: str) -> None:
    """Refuse what is neither a function of the closed list nor an operator that becomes a layer."""
    if _packet(target)[0] not in LAYERS_ONLY:
        function_of(target)


@cache
def function_of(target: str) -> Callable[..., Any]:
    """The function that a target of a program names, from the closed list.

    Raises:
        CupelError: a target that is not on the list.
    """
    if target in PLAIN:
        return PLAIN[target]
    packet, overload = _packet(target)
    if packet in GATES and overload == "input":
        return recurrent(packet)
    if packet in ATEN:
        found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
        return found
    raise CupelError(
        f"operators of a program must be tensor functions that cupel knows; got {target[:120]!r}. "
        "Bring the network as pkg.module:factory with --weights."
    )
