"""Samples a second from shards, no training: ``python -m benchmarks.stream --shards runs/demo/shards``."""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

from benchmarks.measure import write_rows
from g3n.stream.index import load_index
from g3n.stream.lanes import StreamConfig, TrainStream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", required=True, help="folder or URL with index.json")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--output", type=Path, help="folder of stream.csv; default benchmarks/results/<device>")
    args = parser.parse_args()
    index = load_index(args.shards)
    rows = []
    for workers in (0, 1, 2):
        stream = TrainStream(index, StreamConfig(args.shards, workers=workers), index.kind, args.batch, 0, 1, 0)
        batches = iter(stream)
        next(batches)
        start = time.perf_counter()
        samples = sum(len(batch) for batch in itertools.islice(batches, args.batches))
        rate = samples / (time.perf_counter() - start)
        stream.close()
        rows.append({"kind": index.kind, "workers": workers, "batch": args.batch, "samples_per_second": round(rate, 1)})
        print(f"{workers} workers: {rate:.1f} {index.kind}s/s")
    print(write_rows("stream", rows, args.output))


if __name__ == "__main__":
    main()
