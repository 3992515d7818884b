"""Points -> the intrinsic dimension at every block boundary, with its error."""
