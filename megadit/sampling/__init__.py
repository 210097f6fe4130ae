"""From prompt to picture."""
