"""What the passes over the images leave behind: typed records, and their files."""
