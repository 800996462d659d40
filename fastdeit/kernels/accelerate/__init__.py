"""`accelerate` and `restore`: fused ops in the place of a timm model's own code."""
