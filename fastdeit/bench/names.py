"""What the measurements and their flags have in common. It imports nothing: the parser of `fastdeit bench` reads it."""

CAPTURES = ("none", "compile", "graph")
"""Ways of `engine.capture` in which our steps are measured."""
_ATTENTIONS = ("timm_compile", "timm_compile_cudnn", "timm_compile_fa3", "timm_compile_fa4")
GRAPHED_PEERS = ("timm_compile_graph", "timm_compile_graph_pruned")
STEP_PEERS = ("timm", *_ATTENTIONS, *(f"{name}_pruned" for name in _ATTENTIONS), "accelerate", *GRAPHED_PEERS)
"""Peers of a step or forward (`peers.py`), in the order in which they are measured."""
DATA_PEERS = ("timm", "deit", "torchvision", "dali")
"""Peers of an input pipeline (`data_peers.py`)."""
PARITY_CASES = ("supervised", "soft", "hard", "bce_lamb", "cosub", "accumulate", "clip", "finetune")
"""Ways of training of `parity.CASES`."""
ARCHS = 80, 90, 100
"""Architectures of cards for which steps are counted: 90 is sm_90."""
