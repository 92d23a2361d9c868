"""expand-moe: which networks become experts, and what is told of them."""
