"""Names of the libraries that differ between the versions this project supports, or are not part of their public API."""

from transformers import TrainingArguments

# transformers before 5.23 has only the older name.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
