"""What a launch command asks for, and what the server that it starts will do. Imports no engine."""
