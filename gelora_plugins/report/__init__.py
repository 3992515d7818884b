"""What is shown and kept of a plan: sentences, a table, Markdown, pictures. Needs no torch."""
