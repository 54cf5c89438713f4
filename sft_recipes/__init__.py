"""Fine-tune causal language models from one YAML file.

`PackedSFTDataset` and `iterate_batches` are concatenate-and-chunk packing as a library; torch is imported on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_recipes.data.packed_dataset import PackedSFTDataset, iterate_batches

__version__ = "0.1.0"
__all__ = ["PackedSFTDataset", "__version__", "iterate_batches"]


def __getattr__(name: str) -> Any:
    if name in ("PackedSFTDataset", "iterate_batches"):
        from sft_recipes.data import packed_dataset

        return getattr(packed_dataset, name)
    raise AttributeError(f"module 'sft_recipes' has no attribute '{name}'")
