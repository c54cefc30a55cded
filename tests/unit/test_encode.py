"""Latents of an untrained tokenizer: what encode writes against a plain computation of the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import data_prep.encode
from data_prep.encode import encode
from data_prep.shards import PackedSample
from g3n.config import G3nError, build, write_yaml
from g3n.latent import LatentSpace, open_encoder
from g3n.models.decoder import Tokenizer, TokenizerConfig
from g3n.models.mae import MAE, MAEConfig
from g3n.stream.decode import read_latent_sample
from g3n.stream.index import ShardIndex, load_index
from g3n.stream.lanes import StreamConfig, TrainStream
from g3n.tasks.dit import DiTTaskConfig, open_space
from tests import shards

MAE_TREE = {"volume_shape": list(shards.SHAPE), "patch": 2, "width": 48, "depth": 1, "heads": 2, "mlp": 32}
MAE_TREE |= {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2, "decoder_mlp": 24}
NET_TREE = {"latent_channels": 3, "decoder_channels": [8]}


class Chain(NamedTuple):
    volumes: ShardIndex
    tokenizer: Path
    latents: Path


def save_run(run: Path, task: str, model: dict[str, Any], module: nn.Module, artifact: dict[str, Any]) -> None:
    """A run folder as training leaves it, as far as the next stage reads it."""
    step = run / "ckpt" / "step_00000001"
    step.mkdir(parents=True)
    (step / "config.yaml").write_text(write_yaml({"task": task, "model": model}))
    (step / "state.json").write_text(json.dumps({"task": task, "step": 1, "artifact": artifact}))
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, step / "ema.safetensors")
    (step / "COMPLETE").write_text("{}")
    (run / "latest").write_text(step.name)


def scan(subject: int, visit: int, modality: str) -> PackedSample:
    """Volume of one visit; its seed says which."""
    sample = shards.volume_sample(1000 * subject + 10 * visit + (modality == "T2"))
    name = f"{subject:016x}"
    variables = {"modality": modality, "age_years": 50.0 + visit}
    meta = {**sample.meta, "variables": variables, "days_from_baseline": 365 * (visit - 1)}
    return dataclasses.replace(
        sample, key=f"sub-{name}_ses-{visit:02d}_{modality}", subject=name, modality=modality, meta=meta
    )


def tokenizer_run(root: Path, volumes: ShardIndex, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    mae = build(MAEConfig, MAE_TREE)
    save_run(root / "mae", "mae", {"net": MAE_TREE}, MAE(mae), {"shards": volumes.fingerprint})
    encoder_print = open_encoder(root / "mae")[3]
    tokenizer = Tokenizer(build(TokenizerConfig, NET_TREE), mae.width, mae.tokens, mae.patch)
    artifact = {"shards": volumes.fingerprint, "encoder": encoder_print}
    save_run(root / "tokenizer", "decoder", {"encoder": str(root / "mae"), "net": NET_TREE}, tokenizer, artifact)
    return root / "tokenizer"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Two training shards and a validation shard; a subject's scans stand in no order inside its shard."""
    root = tmp_path_factory.mktemp("encode")
    first = [scan(1, 2, "T1"), scan(1, 10, "T1"), scan(2, 1, "T2"), scan(1, 1, "T1"), scan(1, 1, "T2")]
    second = [scan(3, 2, "T1"), scan(3, 1, "T1"), scan(4, 1, "T1")]
    volumes = shards.write(root / "shards", "volume", train=[first, second], val=[[scan(5, 1, "T1")]])
    tokenizer = tokenizer_run(root, volumes)
    encode(str(tokenizer), volumes.url, root / "latents", "cpu", 2)
    return Chain(volumes, tokenizer, root / "latents")


def expected(chain: Chain, subject: int, visits: list[int], modality: str) -> torch.Tensor:
    """Raw projected tokens, one volume at a time and by the formula."""
    space = LatentSpace.open(chain.tokenizer)
    rows = []
    for visit in visits:
        v = torch.from_numpy(scan(subject, visit, modality).array)[None]
        brain = v.double()  # no voxel of these is background
        z = space.encoder(v, brain.mean()[None].float(), (1 / brain.std(unbiased=False))[None].float())
        rows.append(z[0] @ space.tokenizer.projection.weight.T)
    return torch.stack(rows).detach()


def test_latents_are_the_projected_tokens_of_each_visit_in_time_order(chain: Chain) -> None:
    index = load_index(str(chain.latents))
    assert index.kind == "latent"
    assert {n: [s.name for s in e] for n, e in index.splits.items()} == {
        n: [s.name for s in e] for n, e in chain.volumes.splits.items()
    }
    visits = {(1, "T1"): [1, 2, 10], (1, "T2"): [1], (2, "T2"): [1], (3, "T1"): [1, 2], (4, "T1"): [1], (5, "T1"): [1]}
    found = {}
    for shard in (shard for shards_ in index.splits.values() for shard in shards_):
        for sample in shard.samples:
            subject = int(sample.subject, 16)
            assert sample.key == f"sub-{sample.subject}_{sample.modality}"
            latents = read_latent_sample(index, shard, sample)
            numbers = [int(v.days_from_baseline or 0) // 365 + 1 for v in latents.visits]
            found[subject, sample.modality] = numbers
            assert [v.variables["age_years"] for v in latents.visits] == [50.0 + n for n in numbers]
            want = expected(chain, subject, numbers, sample.modality)
            assert latents.tokens.dtype == np.float16
            torch.testing.assert_close(torch.from_numpy(latents.tokens).float(), want, rtol=1e-3, atol=1e-3)
    assert found == visits


def test_statistics_standardize_the_training_latents_and_know_no_validation_volume(chain: Chain) -> None:
    seen = {(1, "T1"): [1, 2, 10], (1, "T2"): [1], (2, "T2"): [1], (3, "T1"): [1, 2], (4, "T1"): [1]}
    raw = torch.cat([expected(chain, s, v, m) for (s, m), v in seen.items()]).double()
    statistics = load_file(chain.latents / "statistics.safetensors")
    centered = raw - raw.mean(dim=0)
    torch.testing.assert_close(statistics["mean"], raw.mean(dim=0).float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        statistics["scale"], centered.square().mean(dim=(0, 1)).sqrt().float(), rtol=1e-3, atol=0
    )
    variables = {"modality": {"levels": ["T1", "T2"]}}
    net = {"tokens": [2, 3, 4], "channels": 3, "width": 24, "depth": 1, "heads": 2, "mlp": 24, "variables": variables}
    config = build(DiTTaskConfig, {"tokenizer": str(chain.tokenizer), "net": net})
    index = load_index(str(chain.latents))
    space = open_space(config, index)
    with closing(TrainStream(index, StreamConfig(index.url, 2), "latent", 6, 0, 1, 0)) as stream:
        z = torch.cat([space.standardize(next(stream).tensors["latent"]) for _ in range(3)])
    assert 0.3 < z.std() < 2


def test_the_index_names_what_made_the_latents_and_no_more(chain: Chain) -> None:
    space = LatentSpace.open(chain.tokenizer)
    tree = json.loads((chain.latents / "index.json").read_text())
    assert tree["tokenizer"] == {"fingerprint": space.tokenizer_fingerprint}
    assert tree["volumes"] == chain.volumes.fingerprint
    source = json.loads((Path(chain.volumes.url) / "index.json").read_text())
    assert (tree["grid"], tree["variables"]) == (source["grid"], source["variables"])
    assert sorted(p.name for p in chain.latents.iterdir()) == [
        "index.json",
        "statistics.safetensors",
        "train-00000.tar",
        "train-00001.tar",
        "val-00000.tar",
    ]


def content(folder: Path) -> dict[str, Any]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**files, "index.json": json.loads(files["index.json"])}


def test_a_stopped_call_goes_on_after_the_last_finished_shard(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    write_shard = data_prep.encode.write_shard

    def stop_at(number: int) -> Callable[..., Any]:
        def write(output: Path, name: str, samples: Any) -> Any:
            if len(calls) == number:
                next(iter(samples))
                raise KeyboardInterrupt
            calls.append(name)
            return write_shard(output, name, samples)

        return write

    monkeypatch.setattr(data_prep.encode, "write_shard", stop_at(1))
    with pytest.raises(KeyboardInterrupt):
        encode(str(chain.tokenizer), chain.volumes.url, tmp_path / "latents", "cpu", 2)
    with pytest.raises(G3nError, match=r"no readable index.json"):
        load_index(str(tmp_path / "latents"))
    monkeypatch.setattr(data_prep.encode, "write_shard", stop_at(99))
    encode(str(chain.tokenizer), chain.volumes.url, tmp_path / "latents", "cpu", 2)
    assert calls == ["train-00000.tar", "train-00001.tar", "val-00000.tar"]
    assert content(tmp_path / "latents") == content(chain.latents)
    before = content(chain.latents)
    encode(str(chain.tokenizer), chain.volumes.url, chain.latents, "cpu", 2)  # finished: nothing to do
    assert content(chain.latents) == before
    assert len(calls) == 3


def test_what_does_not_belong_together_is_refused_before_anything_is_written(chain: Chain, tmp_path: Path) -> None:
    output = tmp_path / "latents"
    foreign = shards.volumes(tmp_path / "foreign", (2, 2))
    with pytest.raises(G3nError, match=f"fingerprint {foreign.fingerprint}, but tokenizer .* was trained on volumes"):
        encode(str(chain.tokenizer), foreign.url, output, "cpu", 2)
    with pytest.raises(G3nError, match="are latents with fingerprint"):
        encode(str(chain.tokenizer), str(chain.latents), output, "cpu", 2)
    with pytest.raises(G3nError, match="is a checkpoint of task 'mae', expected task 'decoder'"):
        encode(str(chain.tokenizer.parent / "mae"), chain.volumes.url, output, "cpu", 2)
    with pytest.raises(G3nError, match="batch is 0"):
        encode(str(chain.tokenizer), chain.volumes.url, output, "cpu", 0)
    for device in ("gpu", "cuda:99"):
        with pytest.raises(G3nError, match=f"device '{device}' cannot be used"):
            encode(str(chain.tokenizer), chain.volumes.url, output, device, 2)
    assert not output.exists()
    occupied = tmp_path / "foreign"
    with pytest.raises(G3nError, match="holds other shards"):
        encode(str(chain.tokenizer), chain.volumes.url, occupied, "cpu", 2)


def test_damage_and_latents_too_large_for_float16_stop_it_by_name(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(self: LatentSpace, volume: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
        return torch.full((len(volume), 24, 3), 7e4)

    with monkeypatch.context() as patch:
        patch.setattr(LatentSpace, "project", large)
        with pytest.raises(G3nError, match=r"latents of subject 0+1 T1 reach 70000, too large for float16"):
            encode(str(chain.tokenizer), chain.volumes.url, tmp_path / "large", "cpu", 2)
    name = shards.flip(chain.volumes, "val", 0, 0)
    try:
        with pytest.raises(G3nError, match=r"cannot encode: shard .*val-00000.tar.") as error:
            encode(str(chain.tokenizer), chain.volumes.url, tmp_path / "damaged", "cpu", 2)
        assert name in str(error.value)
        assert not (tmp_path / "damaged" / "index.json").exists()
    finally:
        shards.flip(chain.volumes, "val", 0, 0)
