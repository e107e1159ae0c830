"""What is measured of metapt, in folders by question; README.md in this folder is the index."""
