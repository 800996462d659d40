"""fastdeit: train DeiT-family vision transformers fast, and get the same result every time."""

__version__ = "0.1.0"
