"""Process groups and the layers that use them. Its words are rank, group, cut, stage, expert, token: no images here."""
