"""sparsify: which tensors, by which scores, at once or while training."""
