"""Fine-tune a language model from one YAML recipe, and trust the result."""

__version__ = "0.1.0"
