import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import shardsave

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())  # every rank trains on data of its own
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
model[0].requires_grad_(False)
for layer in model:
    fully_shard(layer)
fully_shard(model)

if os.path.exists("sharded"):  # saved by any number of ranks
    report = shardsave.load_model(model, "sharded")  # every rank calls it, and fills its part
    if dist.get_rank() == 0:
        print(report)

optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
for _ in range(3):
    model(torch.randn(16, 32)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

report = shardsave.save(model, "sharded", metadata={"ranks": dist.get_world_size()})  # every rank calls it
if dist.get_rank() == 0:
    print(report)
dist.destroy_process_group()
