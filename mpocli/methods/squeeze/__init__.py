"""squeeze: the choice of a bond, the rounds, and their state on disk."""
