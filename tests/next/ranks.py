"""The package's script as one of several ranks on a CPU: `torchrun ranks.py --model_name_or_path ...`."""

import deepspeed.ops
import family
import torch

# An operator for sums among CPU ranks, which takes a minute to compile. Without it, gloo sums.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
family.prepare_process()
family.module("train.train").train()
torch.distributed.barrier()
torch.distributed.destroy_process_group()
