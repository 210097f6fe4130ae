"""What a run will need and cost, before anybody pays for it: memory, communication and time of a layout."""
