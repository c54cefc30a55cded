"""Weights of others from a file the user has: read without running code from it, placed under our names, reported."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from g3n.config import G3nError

MAX_BYTES = 1 << 34
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
_SHOWN = 5


@dataclass(frozen=True)
class KeyReport:
    """How a file's keys met a network's: those loaded, those of the file that the network does not have (other heads, decoders)."""

    loaded: int
    unused: int
    unused_first: tuple[str, ...]

    def __str__(self) -> str:
        names = f" ({', '.join(self.unused_first)}{', ...' if self.unused > _SHOWN else ''})" if self.unused else ""
        return f"{self.loaded} weights loaded, none missing, {self.unused} of the file not used{names}"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Named tensors of a .safetensors file or a file of torch.save, which is read with ``weights_only=True``: no code of it runs.

    A state dict inside another mapping (``state_dict``, ``model``, ...) is found. Raises G3nError for anything else.
    """
    try:
        if not 0 < path.stat().st_size <= MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        tree: Any
        if path.suffix == ".safetensors":
            tree = load_file(path)
        else:
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers of damaged files raise whatever they stumble over
        reason = " ".join(str(error).split())[:160]
        if isinstance(error, pickle.UnpicklingError) and "Weights only" in reason:
            reason = "it is damaged or holds more than tensors; whoever trusts it can save its state dict alone"
        raise G3nError(
            f"weights '{path}' cannot be read ({reason}); expected .safetensors or tensors by torch.save"
        ) from error
    for name in _WRAPPERS:
        if isinstance(tree, Mapping) and isinstance(tree.get(name), Mapping):
            tree = tree[name]
            break
    found = {str(k): v for k, v in tree.items() if isinstance(v, Tensor)} if isinstance(tree, Mapping) else {}
    if not found:
        raise G3nError(f"weights '{path}' hold no named tensors; expected a state dict")
    return found


def under_prefix(weights: Mapping[str, Tensor], anchor: str, what: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights of the part that has ``anchor``, without the prefix before it (``module.``, ``backbone.``, ...), and the other keys.

    Raises G3nError where no key ends with ``anchor``.
    """
    ends = [key for key in weights if key == anchor or key.endswith(f".{anchor}")]
    if not ends:
        raise G3nError(f"the file has no weight '{anchor}', so it is no {what}; its first keys: {_first(weights)}")
    prefix = min(ends, key=len).removesuffix(anchor)
    inside = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    return inside, tuple(key for key in weights if not key.startswith(prefix))


def shape_of(weights: Mapping[str, Tensor], key: str, axes: int, what: str) -> tuple[int, ...]:
    """The shape of a weight from which sizes are told. Raises G3nError where it is not there, empty, or of other than ``axes`` axes."""
    shape = tuple(weights[key].shape) if key in weights else None
    if shape is None or len(shape) != axes or 0 in shape:
        found = "missing" if shape is None else f"of shape {shape}"
        raise G3nError(f"weight '{key}' is {found}, so the file is no {what}; expected {axes} axes")
    return shape


def load_reported(
    module: nn.Module, weights: Mapping[str, Tensor], what: str, outside: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Load every weight of ``module`` and report. ``outside`` are keys of the file that were left out before.

    A network with some weights left at random would give features that mean nothing, so a missing or misshaped one is a G3nError; only
    counters of batch norm may be absent.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    shared = [k for k in own if k in weights]
    if missing:
        raise G3nError(
            f"of the {len(own)} weights of {what} the file has {len(shared)}; missing: {_first(missing)}; "
            f"is it another model's, or one of another size?"
        )
    for key in shared:
        if weights[key].shape != own[key].shape:
            found, expected = tuple(weights[key].shape), tuple(own[key].shape)
            raise G3nError(f"weight '{key}' of {what} is {found}, expected {expected}; is it a model of another size?")
    module.load_state_dict({**own, **{k: weights[k].to(own[k].dtype) for k in shared}})
    unused = [*(k for k in weights if k not in own), *outside]
    return asdict(KeyReport(len(shared), len(unused), tuple(sorted(unused)[:_SHOWN])))


def _first(keys: Any) -> str:
    return ", ".join(f"'{key[:80]}'" for key in sorted(keys)[:3])
