"""What is patched and what may fuse, as data."""
