#!/usr/bin/env bash
# Two hosts by torchrun: the same line on every host, with its own NODE_RANK.
#   FIRST=gpu001 NODES=2 NODE_RANK=0 bash docs/launch/torchrun.sh
# --max-restarts starts all ranks again when one dies; each start goes on from the newest checkpoint.
set -euo pipefail
CONFIG=${CONFIG:-configs/mae.yaml}
exec torchrun --nnodes "${NODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "${GPUS:-8}" \
  --master_addr "${FIRST:-127.0.0.1}" --master_port "${PORT:-29500}" --max-restarts "${RESTARTS:-3}" \
  g3n/train.py --config "$CONFIG"
