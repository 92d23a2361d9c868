"""quantize: which tensors, on which grids, and what is told of them."""
