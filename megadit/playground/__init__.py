"""A page on this machine: a prompt becomes a picture, and a map of which patches the experts picked."""
