"""What each operation of a traced graph does to the labels of channels (see `ops.channels`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from cupel.ops import channel_heads as heads
from cupel.ops import channel_shapes as shapes
from cupel.ops.labels import Flow, Held, Labels, aligned, laid

_OPAQUE = ("MultiheadAttention", "modules.rnn.")  # modules whose Python checks its own sizes
Rule = Callable[["Follower", Any, tuple[int, ...]], Flow]

_KEEP_ZERO = (
    "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "tanh", "hardswish", "hardshrink",
    "softshrink", "abs", "neg", "sqrt", "square", "sign", "sin", "erf", "dropout", "feature_dropout", "alpha_dropout",
    "contiguous", "clone", "to", "_to_copy", "detach", "alias", "lift_fresh_copy", "pow", "hardtanh", "clamp_min",
)  # fmt: skip
_LOSE_ZERO = ("sigmoid", "hardsigmoid", "softplus", "exp", "cos", "rsqrt", "reciprocal", "log_sigmoid", "masked_fill")
_POOLS = (
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_bilinear2d",
)  # fmt: skip
_SHAPES = ("view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze")


def follow(graph: fx.Graph, names: Mapping[str, str], labels: Labels, model: nn.Module) -> None:
    """Lay labels along every node of `graph`; `names` maps its inputs to parameters and buffers."""
    follower = Follower(labels, model)
    for node in graph.nodes:
        follower.visit(node, names)


class Follower:
    """Walks the graph once; each method is the rule of some operations."""

    def __init__(self, labels: Labels, model: nn.Module) -> None:
        self.labels, self.model = labels, model
        self.values: dict[fx.Node, Any] = {}
        self.stack: list[tuple[str, str]] = []  # path and class of the modules that run
        self.name = self.name_before = ""  # of the operation, and of the one before it
        self.rules: dict[str, Rule] = {
            "linear": linear, "batch_norm": batch_norm, "instance_norm": batch_norm, "layer_norm": layer_norm,
            "embedding": embedding, "scaled_dot_product_attention": heads.attention,
            **dict.fromkeys(("matmul", "bmm"), heads.matmul),
            "softmax": heads.softmax, "log_softmax": heads.softmax, "cat": shapes.cat, "unbind": shapes.unbind,
            "select": shapes.select, "split": shapes.pieces, "chunk": shapes.pieces, "slice": shapes.slice_,
            **dict.fromkeys(("transpose", "permute", "t"), shapes.permuted),
            "mean": shapes.mean, "sum": shapes.sum_, "expand": shapes.expand, "pad": shapes.pad, "prelu": prelu,
            **{f"conv{d}d": convolution for d in (1, 2, 3)},
            **{f"conv_transpose{d}d": transposed for d in (1, 2, 3)},
            **dict.fromkeys(("add", "sub", "mul", "div"), binary), **dict.fromkeys(_POOLS, shapes.pool),
            **dict.fromkeys((*_KEEP_ZERO, *_LOSE_ZERO), unary), **dict.fromkeys(_SHAPES, shapes.reshape),
        }  # fmt: skip

    def visit(self, node: fx.Node, names: Mapping[str, str]) -> None:
        if node.op == "placeholder":
            value = node.meta.get("val")
            known = names.get(node.name)
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            self.values[node] = Held(known, shape) if known is not None else Flow(shape)
        elif node.op == "output":
            self.labels.freeze(self._read(node.args))
        elif node.op == "get_attr":
            self.values[node] = Flow(tuple(getattr(node.meta.get("val"), "shape", ())))
        elif str(node.target) == "<built-in function getitem>":
            self.values[node] = self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        else:
            self.values[node] = self._called(node)

    def _read(self, args: Any) -> Any:
        if isinstance(args, fx.Node):
            return self.values[args]
        return [self._read(a) for a in args] if isinstance(args, (list, tuple)) else args

    def _called(self, node: fx.Node) -> Any:
        self.stack = [(path, str(kind)) for path, kind in node.meta.get("nn_module_stack", {}).values()]
        name = str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)
        self.name_before, self.name = self.name, name.rstrip("_")
        args = [*self._read(node.args), *(self._read(v) for v in node.kwargs.values())]
        self.out = node.meta["val"]
        opaque = any(word in kind for _, kind in self.stack for word in _OPAQUE)
        rule = self.rules.get(self.name)
        if rule is None or opaque or (node.kwargs and self.name not in ("sum", "mean", "add", "to", "clone", "gelu")):
            self.labels.freeze(args)
            return self._untracked(self.out)
        found = rule(self, args, tuple(self.out.shape) if isinstance(self.out, Tensor) else ())
        # Of several results where the rule tells of one (a pool that also says where), none is followed.
        return found if isinstance(self.out, Tensor) or not isinstance(found, Flow) else self._untracked(self.out)

    def _untracked(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._untracked(v) for v in value]
        return Flow(tuple(getattr(value, "shape", ())))

    def flow(self, value: Any) -> Flow:
        """A weight that is used like an activation carries labels on its last long axis."""
        if isinstance(value, Flow):
            return value
        if not isinstance(value, Held):
            return Flow(())
        long = [d for d, n in enumerate(value.shape) if n > 1]
        return laid(value.shape, long[-1], self.labels.of(value, long[-1], True)) if long else Flow(value.shape)

    def fixed(self, values: Any, shape: tuple[int, ...]) -> Flow:
        """The result of an operation through which nothing can be cut."""
        self.labels.freeze(values)
        return Flow(shape)

    def needs_zero(self, flow: Flow) -> None:
        """A product or a sum reads the tensor: channels that would not be zero may not go."""
        if not flow.zero:
            self.labels.fix(flow.labels)


def convolution(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x, w, b = f.flow(args[0]), args[1], args[2] if len(args) > 2 else None
    if not isinstance(w, Held) or len(x.shape) != len(w.shape):
        return f.fixed(args, shape)
    groups = args[6] if len(args) > 6 else 1
    f.needs_zero(x)
    read, own = f.labels.along(x, 1), f.labels.of(w, 0, True)
    if w.shape[1] == 1 and groups > 1:  # depthwise: what reads a channel also makes one
        f.labels.fix(own) if read is None else f.labels.join(own, read.repeat_interleave(len(own) // groups))
    else:
        if groups > 1:  # groups of equal size stay so: entry j goes from all of them or from none
            for labels in (own, read):
                if labels is not None:
                    split = labels.view(groups, -1)
                    f.labels.join(split, split[:1].expand_as(split))
        f.labels.tie(w, 1, read if read is None else read[: w.shape[1]])
    f.labels.tie(b, 0, own, True)
    return laid(shape, 1, own)


def transposed(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x, w, b = f.flow(args[0]), args[1], args[2] if len(args) > 2 else None
    groups = args[6] if len(args) > 6 else 1
    if not isinstance(w, Held) or groups > 1:
        return f.fixed(args, shape)
    f.needs_zero(x)
    f.labels.tie(w, 0, f.labels.along(x, 1))
    own = f.labels.of(w, 1, True)
    f.labels.tie(b, 0, own, True)
    return laid(shape, 1, own)


def linear(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x, w, b = f.flow(args[0]), args[1], args[2] if len(args) > 2 else None
    if not isinstance(w, Held):
        return f.fixed(args, shape)
    f.needs_zero(x)
    f.labels.tie(w, 1, f.labels.along(x, -1))
    own = f.labels.of(w, 0, True)
    f.labels.tie(b, 0, own, True)
    return laid(shape, -1, own)


def batch_norm(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x, held = f.flow(args[0]), args[1:5]
    own = f.labels.along(x, 1)
    for i, part in enumerate(held):
        f.labels.tie(part, 0, own, i < 2)
    return laid(shape, 1, own, all(isinstance(h, Held) for h in held[:2]))


def layer_norm(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x, w, b = f.flow(args[0]), *(args[i] if len(args) > i else None for i in (2, 3))
    over = len(args[1])
    if not any(d >= len(shape) - over for d in x.tracked()):
        return Flow(shape, x.labels, False)
    path, kind = f.stack[-1]
    if over > 1 or not kind.endswith("normalization.LayerNorm"):  # only a module can be told how wide it was
        return f.fixed(args, shape)
    f.needs_zero(x)
    own = f.labels.along(x, -1)
    f.labels.tie(w, 0, own, True)
    f.labels.tie(b, 0, own, True)
    f.labels.norms.add(path)
    return laid(shape, -1, own, isinstance(w, Held) and isinstance(b, Held))


def embedding(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    w = args[0]
    return laid(shape, -1, f.labels.of(w, 1, True)) if isinstance(w, Held) else f.fixed(args, shape)


def prelu(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x, w = f.flow(args[0]), args[1]
    if isinstance(w, Held) and w.shape[0] > 1:
        own = f.labels.along(x, 1)
        f.labels.tie(w, 0, own)
        return laid(shape, 1, own, x.zero)
    return Flow(shape, x.labels, x.zero)


def unary(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    x = f.flow(args[0])
    zero = x.zero and f.name not in _LOSE_ZERO
    if f.name == "hardtanh" and len(args) > 2:
        zero &= args[1] <= 0 <= args[2]
    if f.name == "clamp_min":
        zero &= args[1] <= 0
    if f.name == "pow":
        zero &= isinstance(args[1], (int, float)) and args[1] > 0
    return Flow(shape, x.labels, zero)


def binary(f: Follower, args: Any, shape: tuple[int, ...]) -> Flow:
    """Sums are zero where both sides are, products where one is."""
    product = f.name in ("mul", "div")
    if not all(isinstance(a, (Flow, Held)) for a in args[:2]):
        x = f.flow(args[0] if isinstance(args[0], (Flow, Held)) else args[1])
        return Flow(shape, x.labels, x.zero and product)
    wide = []
    for i in (0, 1):
        side = _against(f, args[i], args[1 - i])
        wide.append(
            Flow((1,) * (len(shape) - len(side.shape)) + side.shape, aligned(side.labels, len(shape)), side.zero)
        )
    for one, other in (wide, wide[::-1]):
        if any(other.shape[d] > 1 and d not in other.tracked() for d in one.tracked()):
            f.labels.fix(one.labels)  # the other side has as many entries, and they cannot go
    a, b = wide
    if a.labels is None or b.labels is None:
        kept = a if b.labels is None else b
        return Flow(shape, kept.labels, kept.zero and product and not (f.name == "div" and kept is b))
    if a.tracked() == b.tracked():
        f.labels.join(a.labels, b.labels)
        either = a.zero or (b.zero and f.name == "mul")
        return Flow(shape, a.labels, either if product else a.zero and b.zero)
    return f.fixed(args[:2] + wide, shape)


def _against(f: Follower, value: Any, other: Any) -> Flow:
    """A weight carries labels on the axis where the tensor it meets does."""
    if isinstance(value, Held) and isinstance(other, Flow):
        shift = len(other.shape) - len(value.shape)
        meets = [d - shift for d in other.tracked() if d >= shift and value.shape[d - shift] > 1]
        if len(meets) == 1:
            return laid(value.shape, meets[0], f.labels.of(value, meets[0], True))
        return Flow(value.shape)
    return f.flow(value)
