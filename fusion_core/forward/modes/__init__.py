"""One file an execution mode; `mode_registry.py` lists them."""
