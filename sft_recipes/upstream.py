"""Names of the libraries that differ between the versions this project supports, or are not part of their public API."""

import torch
from transformers import TrainingArguments

# transformers before 5.23 has only the older name.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)

# The function below torch.nn.functional.grouped_mm, which calls it and cannot be intercepted itself. torch has fake tensors of
# it for bfloat16 only, so memory prediction replaces it: without it, mixtures of experts in float32 cannot be predicted.
GROUPED_MM = torch._grouped_mm
