"""Updates of many tensors in one launch: AdamW, LAMB, SGD and the norm of gradients."""
