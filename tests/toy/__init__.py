"""A system of 100 lines outside the tree: what it takes to plug into the trainer, and what tests the trainer."""
