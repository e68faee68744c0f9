"""One operation a file, the torch reference beside the accelerated versions."""
