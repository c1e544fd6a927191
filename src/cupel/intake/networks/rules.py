"""Which calls of an exported graph are layers, and how each layer is made from its arguments and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from cupel.intake.networks.lifted import Value
from cupel.intake.networks.program import Tied
from cupel.intake.networks.reader import Layer, Reader


def _layer(
    kind: type[nn.Module], r: Reader, source: str, tensors: Mapping[str, Tied] | None = None, **given: Any
) -> Layer:
    return Layer(kind, tuple(sorted(given.items())), r(source), tensors or {})


def _conv(kinds: Mapping[int, type[nn.Module]], backwards: bool = False) -> Callable[[Reader], Layer | None]:
    def rule(r: Reader) -> Layer | None:
        tensors = r.optional("weight", "bias")
        if tensors is None or "weight" not in tensors:
            return None
        weight = tensors["weight"].tensor
        turned = backwards or bool(r("transposed", False))
        kind = (_BACKWARDS if turned else kinds).get(weight.ndim)
        if kind is None:
            return None
        groups, sides = r("groups", 1), weight.ndim - 2
        wide = [weight.shape[0], weight.shape[1] * groups]
        given = {"in_channels": wide[0 if turned else 1], "out_channels": wide[1 if turned else 0]}
        for name, usual in (
            ("stride", 1),
            ("padding", 0),
            ("dilation", 1),
            *((("output_padding", 0),) if turned else ()),
        ):
            value = r(name, usual)
            given[name] = tuple(value) * sides if isinstance(value, tuple) and len(value) == 1 else value
        shape = tuple(weight.shape[2:])
        given["padding"] = _in_numbers(given["padding"], shape, given["dilation"])
        return _layer(kind, r, "input", tensors, kernel_size=shape, groups=groups, bias="bias" in tensors, **given)

    return rule


def _in_numbers(padding: Any, kernel: tuple[int, ...], dilation: Any) -> Any:
    """Padding given as a word, in numbers where it is the same on both sides: int8 kernels take numbers alone."""
    if padding == "valid":
        return 0
    spread = [d * (k - 1) for d, k in zip(dilation if isinstance(dilation, tuple) else [dilation] * 9, kernel)]  # noqa: B905
    return tuple(n // 2 for n in spread) if padding == "same" and not any(n % 2 for n in spread) else padding


_FORWARD: Mapping[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_BACKWARDS: Mapping[int, type[nn.Module]] = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}


def _linear(r: Reader) -> Layer | None:
    tensors = r.optional("weight", "bias")
    if tensors is None or "weight" not in tensors or tensors["weight"].tensor.ndim != 2:
        return None
    rows, columns = tensors["weight"].tensor.shape
    return _layer(nn.Linear, r, "input", tensors, in_features=columns, out_features=rows, bias="bias" in tensors)


def _product(left: str, right: str, bias: str = "") -> Callable[[Reader], Layer | None]:
    """x W^T, or x W^T + b, as a linear layer."""

    def rule(r: Reader) -> Layer | None:
        found = r.turned(right)
        added = r.weight(bias) if bias else None
        scaled = r("beta", 1) != 1 or r("alpha", 1) != 1
        if (
            found is None
            or scaled
            or not isinstance(r(left), Value)
            or (bias and (added is None or added.tensor.ndim != 1))
        ):
            return None
        tied, stored = found
        rows, columns = reversed(tied.tensor.shape) if stored else tied.tensor.shape
        tensors = {"weight": tied} | ({"bias": added} if added is not None else {})
        settings = (("bias", added is not None), ("in_features", columns), ("out_features", rows))
        return Layer(nn.Linear, settings, r(left), tensors, frozenset({"weight"} if stored else ()))

    return rule


def _batch_norm(r: Reader) -> Layer | None:
    tensors = r.optional("weight", "bias")
    stats = {name: r.held(r(name)) for name in ("running_mean", "running_var") if r(name) is not None}
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(r.rank("input"))
    whole = tensors is not None and len(tensors) in (0, 2) and len(stats) in (0, 2)
    if kind is None or tensors is None or not whole or any(s is None or s.is_param for s in stats.values()):
        return None
    held = {**tensors, **{name: s for name, s in stats.items() if s is not None}}
    if not held:
        return None
    count = next(iter(held.values()))
    counter = next((t for t in r.program.held.values() if t.name == _sibling(held, "num_batches_tracked")), None)
    if counter is not None and stats:
        held["num_batches_tracked"] = counter
    size = count.tensor.numel()
    given = {"num_features": size, "affine": bool(tensors), "track_running_stats": bool(stats)}
    return _layer(kind, r, "input", held, eps=r("eps", 1e-5), momentum=r("momentum", 0.1), **given)


def _sibling(held: Mapping[str, Tied], leaf: str) -> str:
    path = held.get("running_mean", next(iter(held.values()))).name.rpartition(".")[0]
    return f"{path}.{leaf}" if path else leaf


def _layer_norm(r: Reader) -> Layer | None:
    tensors = r.optional("weight", "bias")
    if tensors is None or ("bias" in tensors and "weight" not in tensors):
        return None
    given = {"elementwise_affine": bool(tensors), "bias": "bias" in tensors}
    return _layer(
        nn.LayerNorm, r, "input", tensors, normalized_shape=r("normalized_shape"), eps=r("eps", 1e-5), **given
    )


def _group_norm(groups: str) -> Callable[[Reader], Layer | None]:
    def rule(r: Reader) -> Layer | None:
        tensors = r.optional("weight", "bias")
        if tensors is None or len(tensors) != 2:
            return None
        size = tensors["weight"].tensor.numel()
        return _layer(nn.GroupNorm, r, "input", tensors, num_groups=r(groups), num_channels=size, eps=r("eps", 1e-5))

    return rule


def _embedding(r: Reader) -> Layer | None:
    tensors = r.optional("weight")
    if not tensors or r("scale_grad_by_freq", False) or r("sparse", False):
        return None
    rows, columns = tensors["weight"].tensor.shape
    pad = r("padding_idx", -1)
    given = {"num_embeddings": rows, "embedding_dim": columns, "padding_idx": None if pad == -1 else pad}
    return _layer(nn.Embedding, r, "indices", tensors, **given)


def _plain(kind: type[nn.Module], source: str = "self", **names: tuple[str, Any]) -> Callable[[Reader], Layer | None]:
    """A layer without tensors: settings by name, each the argument it comes from and its default."""

    def rule(r: Reader) -> Layer | None:
        given = {setting: r(name, usual) for setting, (name, usual) in names.items()}
        if kind in _IN_PLACE and r.node.target.split(".")[3].endswith("_"):
            given["inplace"] = True
        return _layer(kind, r, source, **given)

    return rule


def _pool(kind: type[nn.Module], *more: tuple[str, Any]) -> Callable[[Reader], Layer | None]:
    def rule(r: Reader) -> Layer | None:
        stride = r("stride") or r("kernel_size")
        given = {name: r(name, usual) for name, usual in (("padding", 0), ("ceil_mode", False), *more)}
        return _layer(kind, r, "self", kernel_size=r("kernel_size"), stride=stride, **given)

    return rule


def _softmax(kind: type[nn.Module]) -> Callable[[Reader], Layer | None]:
    def rule(r: Reader) -> Layer | None:
        return None if r("dtype") is not None or r("half_to_float") else _layer(kind, r, "self", dim=r("dim"))

    return rule


def _channels_dropout(r: Reader) -> Layer | None:
    kind = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}.get(r.rank("input"))
    return None if kind is None else _layer(kind, r, "input", p=r("p"))


def _elu(r: Reader) -> Layer | None:
    scaled = r("scale", 1) != 1 or r("input_scale", 1) != 1
    return None if scaled else _layer(nn.ELU, r, "self", alpha=r("alpha", 1.0))


_IN_PLACE = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.LeakyReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.SELU, nn.Dropout
)  # fmt: skip
_AVERAGE = (("count_include_pad", True),)
RULES: dict[str, Callable[[Reader], Layer | None]] = {
    **dict.fromkeys(("conv1d.default", "conv1d.padding", "conv2d.default", "conv2d.padding", "conv3d.default",
                     "conv3d.padding", "convolution.default"), _conv(_FORWARD)),
    **dict.fromkeys(("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input"), _conv({}, True)),
    "linear.default": _linear,
    "addmm.default": _product("mat1", "mat2", "self"),
    "mm.default": _product("self", "mat2"),
    "matmul.default": _product("self", "other"),
    **dict.fromkeys(("batch_norm.default", "_native_batch_norm_legit_no_training.default"), _batch_norm),
    **dict.fromkeys(("layer_norm.default", "native_layer_norm.default"), _layer_norm),
    "group_norm.default": _group_norm("num_groups"),
    "native_group_norm.default": _group_norm("group"),
    "embedding.default": _embedding,
    **dict.fromkeys(("dropout.default", "dropout_.default", "native_dropout.default"),
                    _plain(nn.Dropout, "input", p=("p", 0.5))),
    "feature_dropout.default": _channels_dropout,
    **dict.fromkeys(("relu.default", "relu_.default"), _plain(nn.ReLU)),
    **dict.fromkeys(("relu6.default", "relu6_.default"), _plain(nn.ReLU6)),
    **dict.fromkeys(("silu.default", "silu_.default"), _plain(nn.SiLU)),
    **dict.fromkeys(("mish.default", "mish_.default"), _plain(nn.Mish)),
    **dict.fromkeys(("selu.default", "selu_.default"), _plain(nn.SELU)),
    **dict.fromkeys(("hardswish.default", "hardswish_.default"), _plain(nn.Hardswish)),
    **dict.fromkeys(("hardsigmoid.default", "hardsigmoid_.default"), _plain(nn.Hardsigmoid)),
    **dict.fromkeys(("leaky_relu.default", "leaky_relu_.default"),
                    _plain(nn.LeakyReLU, negative_slope=("negative_slope", 0.01))),
    **dict.fromkeys(("hardtanh.default", "hardtanh_.default"),
                    _plain(nn.Hardtanh, min_val=("min_val", -1), max_val=("max_val", 1))),
    "gelu.default": _plain(nn.GELU, approximate=("approximate", "none")),
    "softplus.default": _plain(nn.Softplus, beta=("beta", 1), threshold=("threshold", 20)),
    "sigmoid.default": _plain(nn.Sigmoid),
    "tanh.default": _plain(nn.Tanh),
    "elu.default": _elu,
    "softmax.int": _softmax(nn.Softmax),
    "_softmax.default": _softmax(nn.Softmax),
    "log_softmax.int": _softmax(nn.LogSoftmax),
    "_log_softmax.default": _softmax(nn.LogSoftmax),
    "flatten.using_ints": _plain(nn.Flatten, start_dim=("start_dim", 0), end_dim=("end_dim", -1)),
    "max_pool1d.default": _pool(nn.MaxPool1d, ("dilation", 1)),
    **dict.fromkeys(("max_pool2d.default", "max_pool2d_with_indices.default"), _pool(nn.MaxPool2d, ("dilation", 1))),
    **dict.fromkeys(("max_pool3d.default", "max_pool3d_with_indices.default"), _pool(nn.MaxPool3d, ("dilation", 1))),
    "avg_pool1d.default": _pool(nn.AvgPool1d, *_AVERAGE),
    "avg_pool2d.default": _pool(nn.AvgPool2d, *_AVERAGE, ("divisor_override", None)),
    "avg_pool3d.default": _pool(nn.AvgPool3d, *_AVERAGE, ("divisor_override", None)),
    "adaptive_avg_pool1d.default": _plain(nn.AdaptiveAvgPool1d, output_size=("output_size", 1)),
    **dict.fromkeys(("adaptive_avg_pool2d.default", "_adaptive_avg_pool2d.default"),
                    _plain(nn.AdaptiveAvgPool2d, output_size=("output_size", 1))),
    **dict.fromkeys(("adaptive_avg_pool3d.default", "_adaptive_avg_pool3d.default"),
                    _plain(nn.AdaptiveAvgPool3d, output_size=("output_size", 1))),
}  # fmt: skip
