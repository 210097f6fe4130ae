"""Text and image encoders that do not train: used by data and sampling."""
