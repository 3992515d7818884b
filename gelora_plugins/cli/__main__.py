"""`python -m gelora_plugins.cli`."""

from gelora_plugins.cli import main

main()
