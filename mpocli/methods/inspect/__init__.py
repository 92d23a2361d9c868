"""inspect: what a checkpoint holds, and whether its manifest tells the truth."""
