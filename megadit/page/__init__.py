"""Made of text alone: HTML pages with plots, for reports of any kind; knows nothing else of megadit."""
