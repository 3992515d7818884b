"""Thin adapters to the frameworks. Installed, and importable, as `gelora_plugins.integrations` only."""

if __name__ != "gelora_plugins.integrations":
    raise ImportError(
        f"This folder was imported as {__name__!r}; expected 'gelora_plugins.integrations'. Install the project "
        "(pip install -e .) and import it under that name."
    )
