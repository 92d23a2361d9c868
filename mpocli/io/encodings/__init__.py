"""How the files hold tensors that they do not hold as they are: one file an encoding."""
