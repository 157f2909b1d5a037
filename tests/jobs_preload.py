"""What every rank of a test needs: imported once by the server from which they are forked."""

import gc
import importlib
import os
import pkgutil

import torch._dynamo  # takes seconds; torch imports it where a tensor is first distributed
import torch.distributed.checkpoint
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401

import shardsave

for module in pkgutil.walk_packages(shardsave.__path__, "shardsave."):
    if not module.name.startswith(("shardsave.__main__", "shardsave.integrations", "shardsave._cli")):
        importlib.import_module(module.name)
for name in os.environ.get("JOBS_PRELOAD", "").split():  # what the test itself wants
    importlib.import_module(name)
gc.collect()
gc.freeze()  # a rank that visited all of torch would copy its memory
