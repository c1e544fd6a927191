"""Technique `int8-ptq`: torch's own static int8 quantisation after training, run on int8 kernels."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from cupel.core.context import Context
from cupel.core.errors import PlanError
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.slots import phase
from cupel.core.types import still
from cupel.ops.watch import entering

CARD = Card(
    name="int8-ptq",
    family="compress",
    source="B. Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only "
    "Inference, CVPR 2018, arXiv 1712.05877; as implemented in torch.ao.quantization",
    tags=("quantization", "int8", "baseline", "library", "power of two"),
    needs=("weights",),
    removes=("gradients", "weights", "blocks", "batchnorm", "attention"),
    tiny={"examples": 16},
)


class Int8Net(nn.Module):
    """A network on int8 kernels: float inputs and outputs, on the CPU, without gradients.

    `whole` says whether values stay int8 from layer to layer, or go back to float after each.
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype, whole: bool) -> None:
        super().__init__()
        self.net = net
        self.dtype, self.whole = dtype, whole

    def forward(self, inputs: Any) -> Tensor:
        for leaf in (inputs,) if isinstance(inputs, Tensor) else tree_leaves(inputs):
            if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
                raise PlanError(f"inputs of an int8 network must be on the CPU; got {leaf.device}. Use --device cpu.")
        with torch.no_grad():
            out: Tensor = self.net(_single(inputs))
        return out.to(self.dtype)

    def __reduce__(self) -> tuple[Callable[..., Int8Net], tuple[bytes, torch.dtype, bool, bool]]:
        # Torch's quantised layers cannot be pickled by themselves: their own state is taken instead.
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer)
        kinds = {type(m) for m in self.net.modules() if "__setstate__" in _own(type(m))}
        pickler.dispatch_table = dict.fromkeys(kinds, lambda m: (_revive, (type(m), m.__getstate__())))
        with _quietly():
            pickler.dump(self.net)
        return _unpickled, (buffer.getvalue(), self.dtype, self.whole, self.training)


def _own(kind: type) -> set[str]:
    """Names that torch's quantised class defines itself, beyond any module's."""
    return {name for base in kind.__mro__ if "quantized" in base.__module__ for name in vars(base)}


def _revive(kind: type[nn.Module], state: Any) -> nn.Module:
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.__setstate__(state)
    return layer


def _unpickled(data: bytes, dtype: torch.dtype, whole: bool, training: bool) -> Int8Net:
    with _quietly():
        return Int8Net(pickle.loads(data), dtype, whole).train(training)


def _single(inputs: Any) -> Any:
    """Inputs with every floating tensor in single precision, which the kernels take."""
    if isinstance(inputs, Tensor):  # at once: a walk through what is one tensor takes as long as a small network
        return inputs.float() if inputs.is_floating_point() else inputs
    return tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, inputs)


@contextmanager
def _quietly() -> Iterator[None]:
    """Torch says at many places, once a process, that this API will move; the user cannot act on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        yield


@dataclass(frozen=True)
class Int8PTQ:
    r"""Run the network on int8 kernels: 8-bit weights a channel, 8-bit activations a tensor.

    q = clip(round(x / s) + z): weights symmetric with a scale for every output channel, activations with
    one scale and zero point that an observer fits to calibration data. Batch norms and ReLUs are folded
    into the layers before them. Inputs and outputs stay float; what torch has no int8 kernel for runs in
    float between the others. There are no gradients and no float weights afterwards. Where torch.fx
    cannot trace the forward, each layer is converted by itself and values go back to float in between:
    as small on disk, but slower. With scales of powers of two s = 2^-f, one for each weight tensor as for each
    activation, rescaling is a shift, as fixed-point kernels of microcontrollers want it; f is the one of the least
    squared error, and z is 0 or, for values of both signs, in the middle.

    Use: first, on CPUs: a quarter of the bytes and faster kernels for tenths of a point, with no training.

    Costs: one pass over the calibration data; gradients are gone, so train and attack it before.

    Shapes: as the network's own.

    Raises:
        PlanError: another device than the CPU, no int8 kernels here, no calibration data, or no layer
            that has a kernel.

    Source: Jacob et al., CVPR 2018, arXiv 1712.05877; torch.ao.quantization. Powers of two: Zhang et al. 2017, arXiv
    1711.07128, section 4.3, which tries values of f in turn on the accuracy instead.

    Departs: per-channel weight scales and a histogram observer, torch's defaults for the engine, in
    place of the paper's per-layer scales and moving averages. Functional calls of linear and convolution
    stay float.

    Example:
        >>> Int8PTQ(examples=64)
        Int8PTQ(examples=64, scales='free')
    """

    examples: int = param(256, "training examples for calibration", ge=1)
    scales: str = param("free", "what scales may be", choices=("free", "power-of-two"))

    @phase("convert")
    def seal(self, model: nn.Module, ctx: Context) -> nn.Module:
        engine = torch.backends.quantized.engine
        if ctx.device.type != "cpu":
            raise PlanError(f"the device for int8-ptq must be the CPU; got {ctx.device}. Run with --device cpu.")
        if engine not in torch.backends.quantized.supported_engines or engine == "none":
            raise PlanError(f"int8-ptq must find int8 kernels in torch; its engine is {engine!r}. Use an x86 CPU.")
        if ctx.train is None:
            raise PlanError("int8-ptq must have data to calibrate on; it has none. Run it in a recipe or with `apply`.")
        batches = ctx.train.train.batches(self.examples, ctx.rng("calibration"))
        inputs = next(iter(batches)).inputs
        # Torch initialises the layers it makes before it fills them, so it draws from the global generator.
        with still(model), torch.no_grad(), _quietly(), ctx.scope("convert"):
            dtype = model(inputs).dtype
            try:
                made = _whole(model, _single(inputs), self._config(engine))
                made.forward(_single(inputs))  # called as a module, it would print where it fails
                return Int8Net(made, dtype, True).eval()
            except Exception as error:  # a forward can defeat torch.fx in any way, and change types as it likes
                ctx.log(
                    kind="note", text=f"layers are converted one by one: torch.fx cannot convert the network: {error}"
                )
            return Int8Net(_by_layer(model, _single(inputs), self._config(engine)), dtype, False).eval()

    def _config(self, engine: str) -> Any:
        """Which observers give weights and activations their scales."""
        from torch.ao.quantization import QConfig, get_default_qconfig

        usual = get_default_qconfig(engine)
        if self.scales == "free":
            return usual
        from cupel.ops.observers import PowerOfTwoObserver as Observer

        # Where the kernels' sums of two products could overflow, torch leaves out the top bit of activations.
        top = 127 if usual.activation().reduce_range else 255
        weight = Observer.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        return QConfig(activation=Observer.with_args(quant_min=0, quant_max=top), weight=weight)


def _copied(model: nn.Module) -> nn.Module:
    """A copy in single precision, in which a network that is one layer has become a module's part."""
    copied = copy.deepcopy(model).float()
    return copied if any(copied.children()) else nn.Sequential(copied).eval()


def _whole(model: nn.Module, inputs: Any, config: Any) -> nn.Module:
    """A copy of `model` whose traced graph stays int8 from kernel to kernel, norms and ReLUs folded in."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    mapping = get_default_qconfig_mapping(torch.backends.quantized.engine)
    usual = mapping.global_qconfig
    for kind, held in mapping.object_type_qconfigs.items():
        if held == usual:
            mapping.object_type_qconfigs[kind] = config
    mapping.set_global(config)
    for call in (F.linear, F.conv1d, F.conv2d, F.conv3d):
        mapping.set_object_type(call, None)  # their packed weights would be no part of the network's state
    ready = prepare_fx(_copied(model), mapping, (inputs,))
    ready(inputs)
    made: fx.GraphModule = convert_fx(ready)
    for node in made.graph.nodes:
        node.type = None  # annotations kept as text cannot be pickled
    made.recompile()
    return made


def _by_layer(model: nn.Module, inputs: Any, config: Any) -> nn.Module:
    """A copy of `model` with every linear and convolution layer on an int8 kernel, float between them."""
    from torch.ao.quantization import QuantWrapper, convert, prepare

    made = _copied(model)
    plain = {n: m for n, m in made.named_modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
    called: set[str] = set()
    with entering(plain, lambda name, x: called.add(name)):
        made(inputs)
    if not called:
        raise PlanError("a network for int8-ptq must call a linear or convolution layer; it calls none. Leave it out.")
    for name in sorted(called):
        plain[name].qconfig = config
        made.set_submodule(name, QuantWrapper(plain[name]))
    prepare(made, inplace=True)
    try:
        made(inputs)
    except AttributeError as error:
        raise PlanError(
            f"layers for int8-ptq must be called, their weights not be read; this network does: {error}. Leave it out."
        ) from None
    converted: nn.Module = convert(made, inplace=True)
    return converted
