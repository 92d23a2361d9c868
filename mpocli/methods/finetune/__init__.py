"""finetune, over several seeds and over-parameterised (OPF) too."""
