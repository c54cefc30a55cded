#!/usr/bin/env bash
# Two hosts by the deepspeed command. Edit HOSTS (docs/launch/hostfile) and CONFIG, then start it on the first host:
#   bash docs/launch/deepspeed.sh                   over ssh with pdsh, from the first host alone
#   bash docs/launch/deepspeed.sh RANK              without ssh: the same on every host, RANK being 0, 1, ...
# pdsh carries only PYTHON*, NCCL* and what stands in ~/.deepspeed_env (NAME=VALUE lines) to the other hosts: put G3N_* there.
set -euo pipefail
HOSTS=${HOSTS:-docs/launch/hostfile}
CONFIG=${CONFIG:-configs/mae.yaml}
FIRST=$(awk '!/^#/ && NF {print $1; exit}' "$HOSTS")
PORT=${PORT:-29500}
if [ $# -eq 0 ]; then
  exec deepspeed --hostfile "$HOSTS" --master_addr "$FIRST" --master_port "$PORT" g3n/train.py --config "$CONFIG"
fi
exec deepspeed --hostfile "$HOSTS" --no_ssh --node_rank "$1" --master_addr "$FIRST" --master_port "$PORT" \
  g3n/train.py --config "$CONFIG"
