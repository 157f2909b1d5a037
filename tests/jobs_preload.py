"""What every rank of a test needs: imported once by the server from which they are forked."""

import torch._dynamo  # `fully_shard` imports it, which takes a second
import torch.distributed.checkpoint
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401

import shardsave  # noqa: F401
