"""A profile of dimensions -> one LoRA rank per block -> an adapter that has them."""
