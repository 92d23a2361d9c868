"""The command line: the only user of typer and rich. A command parses, calls one function, renders."""
