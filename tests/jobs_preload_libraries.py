"""What ranks of tests with models of transformers and PEFT need besides: imported once by the server from which they are forked."""

import gc

import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

gc.collect()
gc.freeze()
