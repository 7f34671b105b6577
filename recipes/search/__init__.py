"""Questions answered with a search engine, as in Search-R1; README.md has the commands."""
