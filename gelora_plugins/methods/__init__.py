"""How an adapter is trained: one file a method. Each ends as plain LoRA."""
