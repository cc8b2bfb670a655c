"""A script of the package as one of several ranks on a CPU: `torchrun ranks.py train.train --output_dir ...`."""

import json
import sys
import types
from pathlib import Path

import deepspeed.ops
import family
import torch

# `train_dpo.py` reads its data by a package that LLaVA-NeXT's repository does not have.
reader = types.ModuleType("data_processing.utils")
reader.load_json = reader.load_jsonl = lambda path: json.loads(Path(path).read_text())
sys.modules.update({"data_processing": types.ModuleType("data_processing"), reader.__name__: reader})

# An operator for sums among CPU ranks, which takes a minute to compile. Without it, gloo sums.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
family.prepare_process()
family.module(sys.argv.pop(1)).train()
torch.distributed.barrier()
torch.distributed.destroy_process_group()
