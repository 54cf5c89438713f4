"""Count a model's parameters: FLOPs, time and memory are computed from these numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters; those of adapters count, and a quantized weight counts as the values that it represents."""

    parameters: int
    trained: int
    layers: int  # number of layers
    layer: int  # parameters of the largest layer
    rest: int  # of everything outside of layers
    trained_layer: int = 0  # trainable ones of the largest layer
    trained_rest: int = 0
    embeddings: int = 0  # of the embeddings, or of the LM head
    experts: int = 0  # of mixture-of-experts layers, of which each token uses a part
