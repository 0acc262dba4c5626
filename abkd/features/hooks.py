"""What a layer of a model received or gave in the forward pass that just ran."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from abkd.errors import InputError
from abkd.head import unwrapped

Side = Literal["input", "output"]


class FeatureHook:
    """While open, keeps the feature of `layer` in the last forward pass of `model`, which computes as before.

    A feature is `[batch, dim]`: of a map `[batch, channels, height, width]` the mean over height and width, of
    anything else the values of an example one after the other. It is a copy: a layer after this one that works in
    place, such as nn.ReLU(inplace=True), does not reach it.

    Args:
        model: any module, or a distributed, compiling or PEFT wrapper around one. What `torch.compile` has run
            already may not see a hook that comes later.
        layer: its dotted name in `named_modules()` of the model inside the wrappers.
        side: what the layer gives, or what it receives: the features before a classifier are `side="input"` of it.
            Of a tuple the first is taken.

    Raises:
        InputError: there is no such layer.
    """

    def __init__(self, model: nn.Module, layer: str, side: Side = "output"):
        modules = dict(unwrapped(model).named_modules())
        if not layer or layer not in modules:
            names = [name for name in modules if name]
            near = difflib.get_close_matches(layer, names, n=5, cutoff=0.3) or names[-5:]
            raise InputError(
                f"layer: {type(unwrapped(model)).__name__} has no layer {layer!r}; near it are {', '.join(near)}"
            )
        if side not in ("input", "output"):
            raise InputError(f"side must be input or output, got {side!r}")
        self.layer, self.side = layer, side
        self._feature: Tensor | None = None
        if side == "input":
            self._handle = modules[layer].register_forward_pre_hook(self._keep_input, with_kwargs=True)
        else:
            self._handle = modules[layer].register_forward_hook(self._keep_output)

    def take(self) -> Tensor:
        """The feature of the last forward pass, attached to its graph, once: a second call needs another pass.

        Raises:
            InputError: no pass has been through the layer since the last call.
        """
        if self._feature is None:
            raise InputError(f"layer: no forward pass has been through {self.layer!r}; choose one that the model calls")
        feature, self._feature = self._feature, None
        return feature

    def close(self) -> None:
        """Leaves the model without a trace of the hook."""
        self._handle.remove()
        self._feature = None

    def __enter__(self) -> "FeatureHook":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _keep_input(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._feature = self._flat((*arguments, *named.values()))

    def _keep_output(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self._feature = self._flat(output)

    def _flat(self, value: Any) -> Tensor:
        while isinstance(value, (tuple, list, Mapping)) and len(value):
            value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
        if not isinstance(value, Tensor) or value.dim() < 2:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"layer: the {self.side} of {self.layer!r} must be [batch, ...], got {found}")
        return value.mean(dim=(2, 3)) if value.dim() == 4 else value.flatten(1).clone()
