"""Rows of the training set -> points: the hidden states of chosen documents at every block boundary."""
