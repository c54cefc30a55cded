"""Exit 0 where a run has reached its last step, 1 where it has not: ``python docs/launch/finished.py --config YAML [key=value ...]``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from g3n.engine.checkpoint import finished_steps
from g3n.train import load_config, parse

args = parse(sys.argv[1:])
config = load_config(args.config, args.overrides)
steps = [int(folder.name.removeprefix("step_")) for folder in finished_steps(config.folder)]
sys.exit(0 if steps and steps[-1] >= config.trainer.steps else 1)
