"""From the raw calls of an exported program to a network of real layers under their own names."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from cupel.core.errors import CupelError
from cupel.intake.networks.functions import LAYERS_ONLY
from cupel.intake.networks.graph import Node, made_by
from cupel.intake.networks.lifted import Held, Lifted, Mode, Plan, Rate, Step, Value, marks_in
from cupel.intake.networks.liveness import in_place, living, writes_to
from cupel.intake.networks.program import Program, Tied
from cupel.intake.networks.reader import Layer, Reader
from cupel.intake.networks.rules import RULES

# Arguments that say whether the network was training when it was exported; the lifted network decides anew.
_MODES = {"lstm": "train", "gru": "train", "rnn_tanh": "train", "rnn_relu": "train", "alpha_dropout": "train",
          "batch_norm": "training", "instance_norm": "use_input_stats"}  # fmt: skip
_DECOMPOSED = {"addmm.default", "convolution.default", "native_layer_norm.default", "_softmax.default",
               "_native_batch_norm_legit_no_training.default", "native_group_norm.default"}  # fmt: skip
_MATRIX = ("conv", "linear", "addmm", "mm", "matmul", "bmm", "lstm", "gru", "rnn")


def lift(program: Program) -> tuple[Lifted, list[str]]:
    """A network of real modules that computes what `program` does, and notes on what was done.

    Convolutions, linear layers (also as products with a parameter), norms, embeddings, activations, pools and
    dropout become modules that hold the original parameters; the rest stays calls of known tensor functions.

    Raises:
        CupelError: the program writes to its own parameters, or its names clash.
    """
    work = _Lifting(program)
    steps = [step for node in program.nodes if (step := work.step_of(node)) is not None]
    steps = living(steps, program.output)
    fresh = writes_to(program.input, steps, work.layers)
    model = Lifted(Plan(program.input, program.output, tuple(steps), fresh).freeing())
    try:
        work.fill(model)
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CupelError(
            f"names of layers and parameters must be free in a module of torch; they are not: {error}. "
            "Rename them and export again."
        ) from None
    return model, work.notes()


class _Lifting:
    """The state of one lifting: modules made so far, and where each parameter went."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.made = {name: node for node in program.nodes for name in made_by(node)}
        marks = [m for node in program.nodes for m in marks_in(tuple(node.args.values()))]
        self.uses = Counter(m.name for m in marks if isinstance(m, Value))
        self.uses[program.output] += 1
        self.layers: dict[str, nn.Module] = {}
        self.same: dict[str, tuple[Any, ...]] = {}  # module path -> what it was made from
        self.parameters: dict[int, nn.Parameter] = {}  # by the identity of their tensor: tied ones stay tied
        self.trained = False
        calls = {node.target.removeprefix("torch.ops.aten.") for node in program.nodes}
        self.decomposed = bool(calls & _DECOMPOSED)
        self.unlifted: list[str] = []
        self.turned: list[str] = []

    def step_of(self, node: Node) -> Step | None:
        """The step for one node; none for counters that a batch norm keeps itself, and for dead transposes."""
        read = Reader(self.program, node, self.made, self.uses)
        op = node.target.removeprefix("torch.ops.aten.")
        self.trained |= node.args.get("training") is True and node.args.get("running_mean") is not None
        self.trained |= (
            op.startswith(("dropout", "native_dropout", "feature_dropout")) and node.args.get("train") is True
        )
        if in_place(node.target):
            owner = read.held(node.args.get("self"))
            if owner is not None and owner.name.endswith("num_batches_tracked"):
                return None
            if owner is not None:
                raise CupelError(
                    f"a program must leave its own tensors alone; it writes to {owner.name}. "
                    "Export it in evaluation mode, without buffers that forward updates."
                )
        rule = RULES.get(op)
        layer = rule(read) if rule is not None and self._single(node) else None
        module = self._made(layer) if layer is not None and not marks_in(layer.settings) else None
        out = node.out if isinstance(node.out, str) else node.out[0]
        if layer is not None and module is not None and out is not None:
            return Step(True, self._path(node, layer, module), (layer.input,), (), out)
        if op.partition(".")[0] in LAYERS_ONLY:
            raise CupelError(
                f"a call of {op} in a program must be a layer of torch.nn; its tensors do not fit one, and torch does "
                "not check them there. Export the network in evaluation mode, without run_decompositions."
            )
        if op.startswith(_MATRIX) and any(read.held(v) is not None for v in marks_in(tuple(node.args.values()))):
            self.unlifted.append(op.partition(".")[0])
        return self._call(node)

    def _single(self, node: Node) -> bool:
        """Whether nobody looks at further results of the call, which a module would not return."""
        return isinstance(node.out, str) or not any(self.uses[name] for name in node.out[1:] if name)

    def _call(self, node: Node) -> Step:
        op = node.target.split(".")[3] if node.target.startswith("torch.ops.aten.") else ""
        args = dict(node.args)
        if op in _MODES and _MODES[op] in args and (op != "instance_norm" or args.get("running_mean") is not None):
            args[_MODES[op]] = Mode()
        if "dropout_p" in args:
            args["dropout_p"] = Rate(args["dropout_p"])
        held = {name: self._placed(value) for name, value in args.items()}
        positional = tuple(held[name] for name in node.positional)
        named = tuple((name, value) for name, value in held.items() if name not in node.positional)
        # The same where a view is possible; elsewhere (channels-last, int8 kernels) it copies in place of failing.
        target = node.target.replace("aten.view.default", "aten.reshape.default")
        return Step(False, target, positional, named, node.out)

    def _placed(self, value: Any) -> Any:
        if isinstance(value, Value):
            tied = self.program.held.get(value.name)
            return value if tied is None else Held(tied.name)
        return tuple(self._placed(part) for part in value) if type(value) is tuple else value

    def _path(self, node: Node, layer: Layer, module: nn.Module) -> str:
        """The path of the module for `layer`: of one that is there already, or of this new one."""
        tensors = tuple(sorted((leaf, id(tied.tensor)) for leaf, tied in layer.tensors.items()))
        key = (layer.kind, repr(layer.settings), tensors)
        for path in self._paths(node, layer):
            if self.same.get(path) == key:
                return path
            if path not in self.same and self._free(path, layer):
                self.same[path] = key
                self.layers[path] = module
                self.turned += [layer.tensors[leaf].name for leaf in layer.turned]
                return path
        raise CupelError(
            f"layers of a program must have names that can differ; {node.out} has none. Rename its layers."
        )

    def _paths(self, node: Node, layer: Layer) -> list[str]:
        """Names to try: the module it was, the owner of its weight, the place it stood in and what it is."""
        word = layer.kind.__name__.lower()
        found = [node.path] if node.kind == layer.kind.__name__ else []
        source = layer.tensors.get("weight") or layer.tensors.get("running_mean")
        if source is not None:
            owner, _, leaf = source.name.rpartition(".")
            tail = leaf.removesuffix("weight").rstrip("_") if leaf.endswith("weight") else leaf
            found.append(".".join(part for part in (owner, tail) if part))
            found.append(f"{source.name}_{word}".replace("weight_", ""))
        inside = (
            f"{node.path}." if node.path and node.path not in self.layers and layer.kind.__name__ != node.kind else ""
        )
        found += [f"{inside}{word}", *(f"{inside}{word}_{n}" for n in range(2, 10_000))]
        return [path for path in found if path]

    def _free(self, path: str, layer: Layer) -> bool:
        """Whether a module can stand at `path`: nothing else is called so, and only its own tensors lie inside."""
        if any(part in self.layers for part in _prefixes(path)[:-1]) or any(
            k.startswith(f"{path}.") for k in self.layers
        ):
            return False
        own = {id(t.tensor) for t in layer.tensors.values()}
        return all(
            id(t.tensor) in own and (t.name != path or self.uses[name] == 1)
            for name, t in self.program.held.items()
            if t.name == path or t.name.startswith(f"{path}.")
        )

    def fill(self, model: Lifted) -> None:
        """Put the layers, and every tensor that no layer holds, into `model` under their names."""
        for path, module in self.layers.items():
            _parent(model, path).add_module(path.rpartition(".")[2], module)
        used = {m.path for step in model._plan.steps for m in marks_in((step.args, step.kwargs)) if isinstance(m, Held)}
        inside = {id(p) for module in self.layers.values() for p in module._parameters.values()}
        for tied in self.program.held.values():
            absorbed = tied.name in self.turned or (tied.is_param and id(self._parameter(tied)) in inside)
            if tied.name in used or not absorbed:
                self._put(model, tied.name, tied)

    def _parameter(self, tied: Tied) -> nn.Parameter:
        """The one parameter of a tensor, whoever asks for it."""
        trains = tied.trains and (tied.tensor.is_floating_point() or tied.tensor.is_complex())
        return self.parameters.setdefault(id(tied.tensor), nn.Parameter(tied.tensor, requires_grad=trains))

    def _made(self, layer: Layer) -> nn.Module | None:
        """The module with the program's own tensors, if it takes exactly them; nothing is allocated on the way."""
        try:
            module = layer.kind(**dict(layer.settings), **({"device": "meta"} if layer.tensors else {}))
        except (TypeError, ValueError, RuntimeError, AssertionError, OverflowError):
            return None
        counter = "num_batches_tracked"
        slots = {**module._parameters, **module._buffers}
        wanted = {leaf: tuple(t.shape) for leaf, t in slots.items() if t is not None and leaf != counter}
        if wanted != {leaf: _shape(layer, leaf) for leaf in layer.tensors if leaf != counter}:
            return None
        if module._buffers.get(counter) is not None:
            module._buffers[counter] = torch.tensor(0)
        for leaf, tied in layer.tensors.items():
            if leaf in layer.turned:
                whole = self._parameter(tied)
                module._parameters[leaf] = nn.Parameter(whole.data.t(), whole.requires_grad)
            elif tied.is_param:
                module._parameters[leaf] = self._parameter(tied)
            else:
                module._buffers[leaf] = tied.tensor
        return module

    def _put(self, model: Lifted, name: str, tied: Tied) -> None:
        parent, leaf = _parent(model, name), name.rpartition(".")[2]
        if leaf in parent._parameters or leaf in parent._buffers:
            return
        if tied.is_param:
            parent.register_parameter(leaf, self._parameter(tied))
        else:
            parent.register_buffer(leaf, tied.tensor, persistent=tied.persistent)

    def notes(self) -> list[str]:
        found = []
        if self.trained:
            found.append("exported in training mode: set to evaluation")
        if self.decomposed:
            found.append("run_decompositions came before it was saved: dropout that the network may have had is gone")
        if self.unlifted:
            kinds = ", ".join(sorted(set(self.unlifted)))
            found.append(f"calls with parameters that are no layers of torch.nn stay calls ({kinds}): they train, but "
                         "techniques that change layers pass them by")  # fmt: skip
        if self.turned:
            found.append(f"matrices stored [in, out] are weights of linear layers now ({', '.join(self.turned[:4])})")
        return found


def _shape(layer: Layer, leaf: str) -> tuple[int, ...]:
    shape = tuple(layer.tensors[leaf].tensor.shape)
    return shape[::-1] if leaf in layer.turned else shape


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _parent(model: nn.Module, path: str) -> nn.Module:
    for part in path.split(".")[:-1]:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    return model
