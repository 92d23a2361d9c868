"""The planner: what each matrix loses at which size, and what each gets of one budget."""
