"""An exported model: a folder of config.json and .safetensors files, read without trust and used in a few lines.

Nothing in it is executed: JSON and safetensors alone, of bounded size, against the shapes that the config asks for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from g3n.config import G3nError, build
from g3n.flow import Sampler
from g3n.generate import Generator, encode_scan, forecast, sample
from g3n.latent import LatentSpace, freeze, pick_device
from g3n.models.conditioning import VariableSet
from g3n.models.decoder import Tokenizer, TokenizerConfig
from g3n.models.dit import DiT, DiTConfig
from g3n.models.mae import Encoder, MAEConfig
from g3n.models.pretrained import Run, fingerprint
from g3n.nifti import Grid, place_on_atlas, to_grid
from g3n.tasks.forecast import forecast_net

FORMAT = "g3n-model-1"
WEIGHTS = "model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 24
MAX_SIZE = 1 << 16  # of any whole number that builds a network
MAX_VOXELS = 1 << 28
MAY_BE_ZERO = ("head_depth", "head_width", "place_rank", "gaussian_rank")
MOST = {"depth": 256, "decoder_depth": 256, "head_depth": 256, "patch": 64, "history": 64, "gaussian_rank": 4096}


@dataclass(frozen=True)
class FlowConfig:
    """A generator or forecaster: ``noise`` is the standard deviation at t = 0, ``step`` how long it was trained.

    ``shift``, ``history`` and ``gate_years`` as in Generator.
    """

    net: DiTConfig
    noise: float
    step: int
    shift: float = 1.0
    history: int = 1
    gate_years: float | None = None


@dataclass(frozen=True)
class Fingerprints:
    """Of weights (xxh3 of names, types and bytes) and of the shards they were trained on."""

    encoder: str
    tokenizer: str  # with the encoder
    generator: str
    volumes: str
    latents: str
    forecaster: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    """config.json: all that is needed to build the networks and to know what they are."""

    format: str
    grid: Grid
    encoder: MAEConfig
    tokenizer: TokenizerConfig
    generator: FlowConfig
    fingerprints: Fingerprints
    forecaster: FlowConfig | None = None
    g3n_version: str = "unknown"
    training: dict[str, Any] = field(default_factory=dict)  # counts and licenses; told, not needed

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format is '{self.format}', this version reads {FORMAT}")
        if self.encoder.volume_shape != self.grid.shape or math.prod(self.grid.shape) > MAX_VOXELS:
            raise ValueError(f"the encoder reads {self.encoder.volume_shape}, the grid is {self.grid.shape}")
        if not all(math.isfinite(x) for row in self.grid.affine for x in row):
            raise ValueError("the grid's affine is not finite")
        wanted = (self.encoder.tokens, self.tokenizer.latent_channels)
        for flow in (self.generator, self.forecaster):
            if flow and (flow.net.tokens, flow.net.channels) != wanted:
                raise ValueError(f"tokens and channels are {(flow.net.tokens, flow.net.channels)}, expected {wanted}")
            if flow and not 0 <= flow.noise < math.inf:
                raise ValueError(f"noise is {flow.noise}")
            if flow and not (0 < flow.shift < math.inf and 0 < (flow.gate_years or 1) < math.inf):
                raise ValueError(f"shift is {flow.shift}, gate_years {flow.gate_years}; both must be positive")
            for name, variable in flow.net.variables.items() if flow else ():
                if not variable.levels and not all(map(math.isfinite, variable.bounds)):
                    raise ValueError(f"the range of {name} is not finite")
        if (self.forecaster is None) != (self.fingerprints.forecaster is None):
            raise ValueError("a forecaster and its fingerprint come together")


@dataclass(frozen=True)
class Model:
    """A loaded model. Volumes are float32 [X, Y, Z] on ``grid``: z-scores, background 0. Latents are standardized float32 [N, C]."""

    generator: Generator
    forecaster: Generator | None
    config: ModelConfig

    @property
    def grid(self) -> Grid:
        return self.config.grid

    def encode(self, volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """Latents of a scan [X, Y, Z] of any orientation and spacing; ``affine`` [4, 4] is voxel -> world mm (RAS+).

        The scan must look like the training scans: skull-stripped, background 0. Raises G3nError for anything but a volume.
        """
        return encode_scan(self.generator.space, self._on_grid(volume, affine))[0].cpu().numpy()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """The volume of ``encode``'s latents. Raises G3nError for another shape."""
        z_NC = torch.as_tensor(np.asarray(latents, np.float32))
        if z_NC.shape != self.generator.space.mean.shape:
            raise G3nError(f"latents are {tuple(z_NC.shape)}, expected {tuple(self.generator.space.mean.shape)}")
        return self.generator.space.decode(z_NC[None].to(self.generator.device))[0].cpu().numpy()

    def sample(
        self, seed: int = 0, steps: int = 50, guidance: float = 2.0, sampler: Sampler = "heun", **variables: Any
    ) -> np.ndarray:
        """A generated volume. A variable left out is null. Raises G3nError for an unknown variable or an impossible value."""
        return next(sample(self.generator, [variables], [seed], steps, guidance, sampler))

    def forecast(
        self,
        volume: np.ndarray,
        affine: np.ndarray,
        age_years: float,
        target_age_years: float,
        seed: int = 0,
        steps: int = 25,
        guidance: float = 1.0,
        sampler: Sampler = "heun",
        **variables: Any,
    ) -> np.ndarray:
        """The follow-up of a scan (see ``encode``) at ``target_age_years``; ``variables`` are the baseline's.

        Raises G3nError where the folder has no forecaster, and as ``sample`` does.
        """
        if self.forecaster is None:
            raise G3nError("this model has no forecaster; export it with --forecaster")
        baseline = {**variables, "age_years": age_years}
        made = forecast(
            self.forecaster, self._on_grid(volume, affine), baseline, [{"age_years": target_age_years}],
            [target_age_years - age_years], [seed], steps, guidance, sampler,
        )  # fmt: skip
        return next(made)

    def _on_grid(self, volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
        x, matrix = np.asarray(volume, np.float32), np.asarray(affine, np.float64)
        if x.ndim != 3 or matrix.shape != (4, 4):
            raise G3nError(f"volume {x.shape} and affine {matrix.shape}: expected [X, Y, Z] and [4, 4]")
        if not (np.isfinite(x).all() and np.isfinite(matrix).all() and (x > 0).any()):
            raise G3nError("the volume is empty, or volume or affine hold numbers that are not finite")
        return to_grid(x, place_on_atlas(x, matrix), self.grid)


def load(path: str | Path, device: str | None = None) -> Model:
    """See ``g3n.load``."""
    path, where = Path(path), pick_device(device)
    config = read_config(path)
    prints = config.fingerprints
    try:
        with torch.device("meta"):  # shapes alone: memory is taken for what the files hold
            encoder = Encoder(config.encoder)
            tokenizer = Tokenizer(config.tokenizer, config.encoder.width, config.encoder.tokens, config.encoder.patch)
            flow, forecaster = DiT(config.generator.net), None
            if config.forecaster:
                its = config.forecaster
                forecaster = forecast_net(its.net, its.noise, its.history, its.gate_years)
    except (ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise G3nError(f"'{path / 'config.json'}' describes no model: {_line(error)}") from error
    read_weights(path, "encoder", encoder, prints.encoder)
    read_weights(path, "tokenizer", tokenizer, None)
    read_weights(path, "generator", flow, prints.generator)
    generator = _generator(path, "dit", config, config.generator, flow, encoder, tokenizer, where)
    if forecaster is None or config.forecaster is None:
        return Model(generator, None, config)
    read_weights(path, "forecaster", forecaster, prints.forecaster)
    second = _generator(path, "forecast", config, config.forecaster, forecaster, encoder, tokenizer, where)
    return Model(generator, second, config)


def read_config(path: Path) -> ModelConfig:
    """config.json of an exported folder. Raises G3nError where it is missing, too large or says something impossible."""
    file = path / "config.json"
    try:
        with open(file, "rb") as stream:
            text = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise G3nError(f"'{path}' has no readable config.json; give a folder that g3n export wrote") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise G3nError(f"'{file}' is larger than {MAX_CONFIG_BYTES} bytes; it is none that g3n export wrote")
    try:
        tree = json.loads(text)
        for part in ("encoder", "tokenizer", "generator", "forecaster"):
            for name, number in _whole_numbers(tree.get(part)):
                low, high = (0 if name in MAY_BE_ZERO else 1), MOST.get(name, MAX_SIZE)
                if not low <= number <= high:
                    raise ValueError(f"{part}: {name} is {number}, allowed: {low} to {high}")
        return build(ModelConfig, tree)
    except (G3nError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise G3nError(f"'{file}' is no {FORMAT} config: {_line(error)}; export again") from error


def _whole_numbers(tree: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """(key, number) of whatever builds a network; ranges of variables and counts of steps do not."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key not in ("variables", "step", "noise"):
                yield from _whole_numbers(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from _whole_numbers(value, name)
    elif isinstance(tree, int) and not isinstance(tree, bool):
        yield name, tree


def read_weights(path: Path, part: str, module: nn.Module, expected: str | None) -> None:
    """Put the tensors of ``path/part/model.safetensors`` into ``module``, which may lie on the meta device.

    Raises G3nError for a missing or damaged file, a header over 16 MiB, tensors of other names, shapes or types, numbers
    that are not finite, or another fingerprint than ``expected``.
    """
    file = path / part / WEIGHTS
    wanted = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    try:
        with open(file, "rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        if header > min(MAX_HEADER_BYTES, file.stat().st_size - 8):
            raise G3nError(f"weights '{file}' announce a header of {header} bytes; export again")
        with safe_open(file, framework="pt") as tensors:
            found = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            for name in sorted(wanted.keys() | found.keys()):
                about = (found[name].get_dtype(), found[name].get_shape()) if name in found else None
                if about != ("F32", wanted.get(name)):
                    raise G3nError(
                        f"weights '{file}': {name[:200]!r} is {about or 'missing'}, the config asks for "
                        f"{('F32', wanted[name]) if name in wanted else 'no such tensor'}; export again"
                    )
            # own, aligned memory: sums of unaligned numbers differ in the last digit, and a mapped file may change
            state = {name: tensors.get_tensor(name).clone() for name in wanted}
    except (OSError, SafetensorError) as error:
        raise G3nError(f"weights '{file}' cannot be read ({_line(error)}); export again") from error
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise G3nError(f"weights '{file}': {name} has numbers that are not finite; export again")
    if expected is not None and fingerprint(state) != expected:
        raise G3nError(f"weights '{file}' have fingerprint {fingerprint(state)}, config.json says {expected[:64]!r}")
    module.load_state_dict(state, assign=True)


def _generator(
    path: Path,
    task: str,
    config: ModelConfig,
    flow: FlowConfig,
    model: DiT,
    encoder: Encoder,
    tokenizer: Tokenizer,
    device: torch.device,
) -> Generator:
    prints = config.fingerprints
    space = LatentSpace(freeze(encoder), freeze(tokenizer), {"shards": prints.volumes})
    if space.tokenizer_fingerprint != prints.tokenizer:
        raise G3nError(
            f"encoder and tokenizer of '{path}' have fingerprint {space.tokenizer_fingerprint}, config.json says "
            f"{prints.tokenizer[:64]!r}"
        )
    space.set_statistics(model.latent_mean, model.latent_scale)
    artifact = {"latents": prints.latents, "tokenizer": prints.tokenizer, "shards": prints.volumes}
    weights: dict[str, Tensor] = dict(model.state_dict())
    run = Run(path, task, {}, artifact, flow.step, weights)
    variables = VariableSet(flow.net.variables)
    return Generator(
        freeze(model).to(device), space.to(device), variables, config.grid, run, device, flow.noise, flow.shift,
        flow.history, flow.gate_years,
    )  # fmt: skip


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
