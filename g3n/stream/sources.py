"""From ``data.shards`` and ``data.where`` to one index: several shard folders mixed by weight, and the samples asked for."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import xxhash

from g3n.config import G3nError, did_you_mean, to_plain
from g3n.stream.index import Sample, Shard, ShardIndex, Source, load_index
from g3n.stream.lanes import StreamConfig
from g3n.stream.order import share_lanes

log = logging.getLogger(__name__)
_SAME = ("grid", "tokenizer")  # of index.json: what must agree beside the kind
_FAR = 0.1  # a share this much off the wanted one, relative to it, is worth a line


def open_shards(config: StreamConfig) -> ShardIndex:
    """The samples a run reads: all of ``data.shards`` that match ``data.where``.

    Raises G3nError for an index that cannot be read, folders that do not fit together, a weight too small for a lane, and
    a filter that names what is not there or leaves nothing to train on.
    """
    wanted = {config.shards: 1.0} if isinstance(config.shards, str) else config.shards
    indexes = [(load_index(url, config.cache, config.cache_gib), weight) for url, weight in wanted.items()]
    index = merge(indexes) if len(indexes) > 1 else indexes[0][0]
    if config.where:
        index = choose(index, config.where)
    if len(index.sources) > 1:
        _explain_shares(index, config.lanes)
    samples = {split: tuple(_bare(shard) for shard in shards) for split, shards in index.splits.items()}
    return replace(index, splits=samples)


def merge(parts: Sequence[tuple[ShardIndex, float]]) -> ShardIndex:
    """One index of several. Their order does not matter. Raises G3nError where they do not fit together."""
    parts = sorted(parts, key=lambda part: part[0].fingerprint)
    first = parts[0][0]
    for other, _ in parts[1:]:
        for name, a, b in [
            ("kind", first.kind, other.kind),
            *((n, first.raw.get(n), other.raw.get(n)) for n in _SAME),
        ]:
            if a != b:
                raise G3nError(f"shards '{first.url}' and '{other.url}' cannot be mixed: their {name} is {a} and {b}")
    _check_overlap([index for index, _ in parts])
    total = sum(weight for _, weight in parts)
    sources = tuple(Source(index.url, index.fingerprint, weight / total) for index, weight in parts)
    text = repr([(source.fingerprint, round(source.weight, 9)) for source in sources])
    splits = dict.fromkeys(split for index, _ in parts for split in index.splits)
    return replace(
        first,
        url=" + ".join(source.url for source in sources),
        fingerprint=xxhash.xxh3_64_hexdigest(text),
        variables=_united([index.variables for index, _ in parts]),
        splits={split: tuple(s for index, _ in parts for s in index.splits.get(split, ())) for split in splits},
        raw={**first.raw, "grid": to_plain(first.grid)},
        sources=sources,
    )


def _check_overlap(indexes: Sequence[ShardIndex]) -> None:
    """No sample twice, and nobody trained on in one folder and held out in another."""
    keys: dict[str, str] = {}
    splits: dict[str, tuple[str, str]] = {}
    for index in indexes:
        for split, shards in index.splits.items():
            for sample in (sample for shard in shards for sample in shard.samples):
                if keys.setdefault(sample.key, index.url) != index.url:
                    raise G3nError(
                        f"sample '{sample.key}' is in '{keys[sample.key]}' and in '{index.url}'; give one of them"
                    )
                before, url = splits.setdefault(sample.subject, (split, index.url))
                if before != split:
                    raise G3nError(
                        f"subject {sample.subject} is in split '{before}' of '{url}' and '{split}' of '{index.url}'; "
                        f"scan both folders together, or with the same seed and shares"
                    )


def _united(tables: Sequence[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    """Levels of any table; the widest range of a number."""
    names = dict.fromkeys(name for table in tables for name in table)
    united: dict[str, list[Any]] = {}
    for name in names:
        values = [value for table in tables for value in table.get(name, ())]
        united[name] = [min(values), max(values)] if _is_range(values) else list(dict.fromkeys(values))
    return united


def _is_range(values: Sequence[Any]) -> bool:
    return bool(values) and not any(isinstance(value, str) for value in values)


def choose(index: ShardIndex, where: Mapping[str, Sequence[Any]]) -> ShardIndex:
    """The samples whose every visit matches: one of the levels, or a number from low to high; a missing value does not.

    Raises G3nError for an unknown variable or level, or where a source has nothing left to train on.
    """
    for name, values in where.items():
        _check_condition(index, name, values)
    ranges = {name: _is_range(index.variables[name]) for name in where}

    def matches(sample: Sample, shard: Shard) -> bool:
        if sample.variables is None and set(where) != {"modality"}:
            raise G3nError(
                f"the index of '{shard.folder}' has no variables of samples, so data.where can ask for modality alone; "
                f"pack (or encode) again"
            )
        tables = sample.variables or ({"modality": sample.modality},)
        return all(_fits(table.get(name), values, ranges[name]) for table in tables for name, values in where.items())

    splits = {
        split: tuple(replace(shard, samples=tuple(s for s in shard.samples if matches(s, shard))) for shard in shards)
        for split, shards in index.splits.items()
    }
    for source in index.sources:
        if not any(shard.samples for shard in splits.get("train", ()) if shard.folder == source.url):
            raise G3nError(f"data.where leaves no training sample of '{source.url}'; ask for less")
    return replace(index, splits=splits)


def _fits(value: Any, wanted: Sequence[Any], is_range: bool) -> bool:
    if value is None:
        return False
    if not is_range:
        return value in wanted
    return isinstance(value, int | float) and wanted[0] <= value <= wanted[1]


def _check_condition(index: ShardIndex, name: str, values: Sequence[Any]) -> None:
    if name not in index.variables:
        raise G3nError(
            f"data.where asks for '{name}', no variable of '{index.url}'{did_you_mean(name, list(index.variables))}"
        )
    known = index.variables[name]
    if _is_range(known):
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
        if not numbers or len(values) != 2 or values[0] > values[1]:
            raise G3nError(
                f"data.where.{name} is {list(values)}; expected [low, high], two numbers ({known} are there)"
            )
        return
    for value in values:
        if value not in known:
            raise G3nError(f"data.where.{name} asks for '{value}'{did_you_mean(str(value), [str(k) for k in known])}")


def _explain_shares(index: ShardIndex, lanes: int) -> None:
    """Raise G3nError where a source gets no lane; say what each source gets where that is not what was asked for."""
    given = share_lanes([source.weight for source in index.sources], lanes)
    shares = [given.count(i) / lanes for i in range(len(index.sources))]
    for source, share in zip(index.sources, shares, strict=True):
        if share == 0:
            raise G3nError(
                f"shards '{source.url}' have {source.weight:.2%} of the weight, too little for one of {lanes} lanes; raise "
                f"data.lanes to {math.ceil(1 / source.weight)}, or their weight"
            )
    if os.environ.get("RANK", "0") == "0":  # every rank finds the same
        far = any(abs(share - s.weight) > _FAR * s.weight for s, share in zip(index.sources, shares, strict=True))
        listed = ", ".join(f"'{s.url}' {share:.1%}" for s, share in zip(index.sources, shares, strict=True))
        level = logging.WARNING if far else logging.INFO
        log.log(level, "of each batch come from %s (data.lanes %d decides how fine shares are)", listed, lanes)


def _bare(shard: Shard) -> Shard:
    """Without variables of samples: they have done their service, and the index stays in memory."""
    return replace(shard, samples=tuple(replace(sample, variables=None) for sample in shard.samples))
