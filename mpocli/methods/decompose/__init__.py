"""decompose: which matrices, what they become, what is told of them."""
