"""How an engine is hooked: thin, with all meaning left to the core."""
