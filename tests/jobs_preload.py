"""What every rank of a test needs: imported once by the server from which they are forked."""

import torch._dynamo  # takes seconds; torch imports it where a tensor is first distributed
import torch.distributed.checkpoint
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401

import shardsave
import shardsave._ranks.save_job
import shardsave._ranks.session  # noqa: F401
