"""Skills over several runs: the page, and the words and rows that the terminal shows, too."""
