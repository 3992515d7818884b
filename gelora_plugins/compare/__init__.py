"""`gelora compare`: allocations of ranks, and ways to train them, at equal LoRA parameters."""
